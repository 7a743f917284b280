"""How far a stage is: a bar on a terminal, and in a batch log a line now and then that says how long it will take."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Leg:
    """A part of a stage that has a bar of its own, such as an epoch; counted in items of the loop over it."""

    what: str
    total: int
    """Items of the leg, with those that an earlier process did."""
    first: int = 0
    """Of these, done before the loop."""
    before: int = 0
    """Items of the stage's legs before this one."""
    way: int | None = None
    """Items of the whole stage; None: there is no more than this leg."""
    parts: int = 1
    """Items to a step."""
    images: Callable[[Any], int] | None = None
    """How many images an item stands for, on all ranks."""


class Pace:
    """Shows how far one stage is, where ``is_main``; the loops themselves are not changed by it.

    ``say`` prints a line that begins with the stage's name. A line comes when ``seconds`` have passed since the last,
    so that what ends before that says nothing.
    """

    def __init__(
        self,
        stage: str,
        say: Callable[[str], None],
        *,
        is_main: bool,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stage, self._say, self._is_main = stage, say, is_main
        self._seconds, self._clock = seconds, clock
        self._started: float | None = None
        self._due = 0.0
        self._done = 0
        """Items of all legs, in this process."""

    def follow(self, items: Iterable[T], leg: Leg) -> Iterable[T]:
        """The items, which are shown as they pass."""
        if not self._is_main:
            return items
        if sys.stderr.isatty():
            return tqdm(
                items, desc=f"{self._stage} {leg.what}", total=leg.total, initial=leg.first, unit="step", leave=False
            )
        return self._speak(items, leg)

    def _speak(self, items: Iterable[T], leg: Leg) -> Iterator[T]:
        started = self._clock()
        if self._started is None:
            self._started, self._due = started, started + self._seconds
        images = 0
        for number, item in enumerate(items, leg.first + 1):
            yield item
            self._done += 1
            images += leg.images(item) if leg.images else 0
            now = self._clock()
            if now >= self._due and number < leg.total:
                self._due = now + self._seconds
                step, steps = number // leg.parts, leg.total // leg.parts
                rate = f"{images / (now - started):,.0f} images/s  " if leg.images else ""
                self._say(f"{leg.what}  step {step}/{steps}  {rate}{in_words(self._left(leg, number, now))} left")

    def _left(self, leg: Leg, number: int, now: float) -> float:
        """Seconds until the stage's end, at its pace so far; evaluations between the legs are part of that."""
        assert self._started is not None, "there was an item"
        way = leg.total if leg.way is None else leg.way
        return (way - leg.before - number) * (now - self._started) / self._done


def in_words(seconds: float) -> str:
    """A time to come, no more exact than it is known: 40 s, 4 min, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
