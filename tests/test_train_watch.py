"""The thread that says of a process that it runs."""

import threading
import time
from datetime import timedelta
from typing import Any

from torch.distributed import HashStore

from netslim.train.ranks.watch import Watch


class SlowStore:
    """A store that says when the thread writes to it, and then takes its time."""

    def __init__(self) -> None:
        self.store, self.thread_writes = HashStore(), threading.Event()
        self.store.set_timeout(timedelta(seconds=5))

    def set(self, key: str, value: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            self.thread_writes.set()
            time.sleep(0.2)
        self.store.set(key, value)

    def get(self, key: str) -> bytes:
        return self.store.get(key)


def test_a_process_leaves_after_its_last_beat_and_with_no_thread_in_the_store() -> None:
    slow = SlowStore()
    watch = Watch(slow, 0, lambda member: [member], timeout=60, state=lambda: (0, "the start"))
    assert slow.thread_writes.wait(60)
    watch.leave()
    assert "netslim-watch" not in {thread.name for thread in threading.enumerate()}
    time.sleep(0.3)
    assert slow.get("0") == b"left"
