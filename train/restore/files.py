"""Restore files, one after the other, while the next one is read and the last one is written."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from train.restore.picture import (
    MOST_PIXELS,
    Picture,
    PictureError,
    check_target,
    decode,
    encode,
    one_line,
    read_picture,
    write_picture,
)
from train.restore.restorer import Restorer, Tile
from train.restore.sources import PIPE, Job

WRITING = 2  # pictures that may wait to be written: more would only fill the memory


@dataclass(frozen=True)
class How:
    """How pictures are restored and written. most: pixels of the largest that is read. skip_existing: what is restored
    already is left as it is."""

    strength: float = 1.0
    tile: Tile = "auto"
    ensemble: bool = False
    overwrite: bool = False
    skip_existing: bool = False
    most: int = MOST_PIXELS


@dataclass(frozen=True)
class Outcome:
    """What became of a file; `part`: this process' share of a video is done. size: (width, height) px. seconds: of the
    restoring alone."""

    source: Path
    target: Path
    status: Literal["restored", "there", "failed", "part"]
    problem: str | None = None
    size: tuple[int, int] | None = None
    seconds: float | None = None


def restore_picture(
    restorer: Restorer, picture: Picture, how: How, on_tile: Callable[[int, int], None] = lambda done, all_: None
) -> Picture:
    """The picture with its colours restored; grey stays grey, and all else what it was."""
    colour = picture.colour
    pixels = torch.from_numpy(np.require(colour, requirements=["C", "W"])).permute(2, 0, 1).expand(3, -1, -1)
    settings = {"strength": how.strength, "tile": how.tile, "ensemble": how.ensemble}
    result = restorer.restore(pixels, **settings, on_tile=on_tile).permute(1, 2, 0).numpy()
    if colour.shape[2] == 1:
        result = np.rint(result.mean(axis=2, keepdims=True, dtype=np.float32)).astype(colour.dtype)
    return replace(picture, colour=result)


def problem_of(error: Exception, source: Path) -> str:
    """One line for the user about what went wrong with a file."""
    if isinstance(error, PictureError):
        return str(error)
    where = error.filename if isinstance(error, OSError) and error.filename else source
    said = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
    return f"{where}: {said}"


def restore_files(
    restorer: Restorer,
    jobs: Sequence[Job],
    how: How,
    *,
    on_done: Callable[[Outcome], None],
    on_tile: Callable[[Path, int, int], None] = lambda source, done, all_: None,
) -> None:
    """Restore pictures; `on_done` is told of each, in their order, when it is on the disk, `on_tile` of the work on
    one. A picture that cannot be read or written does not stop the others."""
    waiting: deque[tuple[Future, Outcome]] = deque()

    def tell(most: int) -> None:
        while len(waiting) > most or (waiting and waiting[0][0].done()):
            written, outcome = waiting.popleft()
            try:
                written.result()
                on_done(outcome)
            except Exception as error:
                on_done(replace(outcome, status="failed", problem=problem_of(error, outcome.source)))

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        for job, reading in _ahead(jobs, reader, how):
            outcome = Outcome(job.source, job.target, "restored")
            written: Future = Future()
            try:
                picture = reading.result()
                if picture is None:
                    outcome = replace(outcome, status="there")
                    written.set_result(None)
                else:
                    start = time.perf_counter()
                    picture = restore_picture(restorer, picture, how, partial(on_tile, job.source))
                    size = picture.colour.shape[1::-1]
                    outcome = replace(outcome, size=size, seconds=time.perf_counter() - start)
                    written = writer.submit(_write, job.target, picture, how)
            except Exception as error:  # whatever it is, the other pictures are none the worse
                written.set_exception(error)
            waiting.append((written, outcome))
            tell(WRITING)
        tell(0)


def _ahead(jobs: Sequence[Job], reader: ThreadPoolExecutor, how: How) -> Iterator[tuple[Job, Future[Picture | None]]]:
    """Each job with its picture to come; the next one is read while a job is worked on."""
    started: deque[tuple[Job, Future]] = deque()
    for job in jobs:
        started.append((job, reader.submit(_read, job, how)))
        if len(started) > 1:
            yield started.popleft()
    yield from started


def _read(job: Job, how: How) -> Picture | None:
    """The picture of a job, None where it is restored already; a target that cannot be is told before any work."""
    if job.target != PIPE:
        if how.skip_existing and job.target.exists():
            return None
        check_target(job.target, overwrite=how.overwrite)
    if job.source == PIPE:
        return decode(sys.stdin.buffer.read(), "standard input", how.most)
    return read_picture(job.source, how.most)


def _write(target: Path, picture: Picture, how: How) -> None:
    if target != PIPE:
        return write_picture(target, picture, overwrite=how.overwrite)
    data = encode(picture, picture.kind, "standard output")
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # else Python says it again when it ends
            sys.stdout.close()
        raise PictureError("standard output: its reader went away") from None
