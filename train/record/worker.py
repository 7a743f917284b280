"""What may take long, done by a thread for somebody who waits only so long."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Self


class Worker:
    """A thread that does one thing after the other. Use it with ``with``, or `close` it.

    What it is stuck in keeps no interpreter from ending.
    """

    def __init__(self, name: str) -> None:
        self._todo: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def do(self, act: Callable[[], Any], seconds: float | None) -> Any:
        """What ``act`` gives or raises; TimeoutError where it takes longer, and is left to itself."""
        done: Future[Any] = Future()
        self._todo.put((act, done))
        try:
            return done.result(seconds)
        except TimeoutError as error:
            if done.done():  # its own
                raise
            raise TimeoutError(f"no answer in {seconds:g} s") from error

    def close(self) -> None:
        """Let the thread end after what it does."""
        self._todo.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while (job := self._todo.get()) is not None:
            act, done = job
            try:
                done.set_result(act())
            except BaseException as error:
                done.set_exception(error)
