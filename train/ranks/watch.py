"""Notices ranks that died, stopped or fell behind, and names them: a process group only says that one is missing."""

import atexit
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

PERIOD = 0.5
"""Seconds between two looks."""
_LEFT = b"left"
_LEAVING_SECONDS = 5.0
"""The longest that a process waits for its thread: the host of the store may be gone."""


@dataclass(frozen=True)
class Member:
    """The process of one rank."""

    host: str
    """With its name space of processes: containers may share a host's name."""
    pid: int

    @classmethod
    def own(cls) -> Self:
        return cls(_own_host(), os.getpid())

    def is_dead(self) -> bool:
        """Whether the process ended, as far as can be seen from its own host."""
        if self.host != _own_host():
            return False
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
        except (FileNotFoundError, ProcessLookupError):
            return True

    def kill(self) -> None:
        """End a process that answers nothing else, where it is on this host."""
        if self.host == _own_host():
            os.kill(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself every `PERIOD`."""

    count: int
    """Rises as long as the process runs."""
    arrivals: int
    """Operations of the whole group that its main thread has come to."""
    place: str


class Watch:
    """A thread that tells the others that this process runs and how far it is, and looks at the next rank.

    Every rank looks at the one after it, so that the work does not grow with their number. A rank that is dead, or
    does not come to an operation of the group for `timeout` seconds while this one waits in it, ends this process
    with a line that names it, also where this process is not waiting for the group or its back end cannot tell.

    Arguments: a key-value store that all ranks share (of torch.distributed), this rank, `gather` that gives every rank
    what each of them gave, the time-out in seconds, and `state` that gives this rank's arrivals and place.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        gather: Callable[[Member], Sequence[Member]],
        timeout: float,
        state: Callable[[], tuple[int, str]],
    ) -> None:
        self._store, self._rank, self._timeout, self._state = store, rank, timeout, state
        self._count = 0
        self._leaving, self._speaking = threading.Event(), threading.Lock()
        self._tell()
        self._members = gather(Member.own())  # afterwards every rank's first beat can be read
        atexit.register(self.leave)
        self._thread = threading.Thread(target=self._look, daemon=True, name="netslim-watch")
        self._thread.start()

    def leave(self) -> None:
        """Tell the others that this process ends on its own account, after the last beat."""
        if self._leaving.is_set():
            return
        self._leaving.set()
        if threading.current_thread() is not self._thread:
            # a thread that is inside the store, which is C++, when the interpreter ends would abort the process
            self._thread.join(_LEAVING_SECONDS)
        self._try(lambda: self._store.set(str(self._rank), _LEFT))

    def blame(self, *, timed_out: bool) -> str:
        """Say which ranks are to blame for a group that failed, and kill those on this host that keep it waiting."""
        self._speaking.acquire()  # for ever: the thread has nothing to add
        line, culprits = self._find_culprits(timed_out)
        for rank in culprits:
            self._members[rank].kill()
        return line

    def _look(self) -> None:
        following = (self._rank + 1) % len(self._members)
        seen: Beat | None = None
        times = {"count": time.monotonic(), "arrivals": time.monotonic()}
        while not self._leaving.wait(PERIOD):
            self._tell()
            beat, now = self._beat_of(following), time.monotonic()
            for key in times:
                if beat is None or seen is None or getattr(seen, key) != getattr(beat, key):
                    times[key] = now
            seen = beat
            is_silent = now - times["count"] > self._timeout
            is_late = now - times["arrivals"] > self._timeout and beat is not None and beat.arrivals < self._state()[0]
            if is_silent or is_late or self._dead():
                self._leaving.wait(PERIOD)  # where the main thread waits for the group it has seen it by now
                self._end(is_late)

    def _end(self, timed_out: bool) -> None:
        if self._leaving.is_set() or not self._speaking.acquire(blocking=False):
            return
        line, culprits = self._find_culprits(timed_out)
        if not line or self._leaving.is_set():
            self._speaking.release()
            return
        place = self._state()[1]
        print(f"netslim: {place}: {line}; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.stderr.flush()
        self.leave()
        for rank in culprits:
            self._members[rank].kill()
        os._exit(1)

    def _find_culprits(self, timed_out: bool) -> tuple[str, list[int]]:
        """A phrase about the ranks that keep the others waiting, and those of them that live; ("", []) if none does."""
        others = [rank for rank in range(len(self._members)) if rank != self._rank]
        before = {rank: self._beat_of(rank) for rank in others}
        for _ in range(3):
            if dead := self._dead():
                return f"{_name(dead)} died", []
            time.sleep(PERIOD)
        after = {rank: beat for rank in others if (beat := self._beat_of(rank)) is not None}
        silent = [rank for rank, beat in after.items() if beat == before[rank]]
        arrivals = self._state()[0]
        late = silent or [rank for rank, beat in after.items() if timed_out and beat.arrivals < arrivals]
        if late:
            what = "does not run any more" if silent else f"did not answer within {self._timeout:g} s"
            return f"{_name(late)} {what} (last seen in {after[late[0]].place})", late
        gone = [rank for rank in others if rank not in after]
        return (f"{_name(gone)} ended", []) if gone else ("", [])

    def _dead(self) -> list[int]:
        """Ranks on this host whose process ended without leaving."""
        dead = [rank for rank, member in enumerate(self._members) if member.is_dead()]
        return [rank for rank in dead if self._beat_of(rank) is not None]

    def _tell(self) -> None:
        self._count += 1
        arrivals, place = self._state()
        self._try(lambda: self._store.set(str(self._rank), json.dumps([self._count, arrivals, place])))

    def _beat_of(self, rank: int) -> Beat | None:
        """None for a rank that left, or where the store is gone with the process that held it."""
        said = self._try(lambda: self._store.get(str(rank)))
        return None if said is None or said == _LEFT else Beat(*json.loads(said))

    def _try(self, call: Callable[[], Any]) -> bytes | None:
        try:
            return cast("bytes | None", call())
        except RuntimeError:  # of torch.distributed
            return None


def _own_host() -> str:
    return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"


def _name(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
