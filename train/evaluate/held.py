"""The validation list in memory: its pairs are the same at every evaluation of a run, and so is what they measure
without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

LIMIT = 2**29  # bytes a process


class HeldPairs:
    """Pairs that are asked for again and again, as `make` makes them. Where all of them, `size` bytes, need at most
    `limit`, they are made once, as far as they are asked for, and what is put into them stays."""

    def __init__(self, make: Callable[[], Iterable[dict[str, Any]]], size: int, limit: int = LIMIT) -> None:
        self._make, self._keep = make, size <= limit
        self._held: list[dict[str, Any]] = []
        self._rest: Iterator[dict[str, Any]] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self._keep:
            yield from self._make()
            return
        place = 0
        while True:
            if place == len(self._held):
                if self._rest is None:
                    self._rest = iter(self._make())
                pair = next(self._rest, None)
                if pair is None:
                    return
                self._held.append(pair)
            yield self._held[place]
            place += 1
