"""`sharpprior restore`: pictures, folders of them, a pipe, and videos."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from train.cli.console import told_now_and_then, usable_device
from train.cli.data import Overwrite

if TYPE_CHECKING:
    from train.restore.files import How, Outcome
    from train.restore.restorer import Restorer
    from train.restore.sources import Found, Job

app = typer.Typer()


@app.command()
def restore(
    photos: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] PHOTOS...",
            help="Pictures, videos, folders, patterns ('*.jpg'), or - for standard input; without --model, a first "
            "one that is a model is the model.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="File for one, else a folder; - for standard output. Default: beside each."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Run, checkpoint, exported model, owner/name of the Hugging Face cache; default: the shipped one."
        ),
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="latest, best, or step-N, where the model is a run.")] = "latest",
    suffix: Annotated[
        str | None, typer.Option(help="Put behind each name; default: _restored where results lie beside sources.")
    ] = None,
    strength: Annotated[float, typer.Option(help="0: the input, 1: what was restored; between: a blend.")] = 1.0,
    ensemble: Annotated[bool, typer.Option("--ensemble", help="Mean of 8 flips and turns: 8 times the time.")] = False,
    tile: Annotated[int | None, typer.Option(help="Side of tiles, px; default: 1.5 times the training crop.")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="No tiles: the picture in one piece.")] = False,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16 (a GPU's).")] = "fp32",
    overwrite: Overwrite = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave restored pictures that are there: go on with a folder.")
    ] = False,
    max_megapixels: Annotated[float, typer.Option(help="Refuse larger pictures.", min=0)] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON a file on standard output.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: a GPU where there is one.")] = None,
    rank: Annotated[
        int | None, typer.Option(help="Which part of the work is done here; default: the launcher's.")
    ] = None,
    world: Annotated[int | None, typer.Option(help="Among how many processes it is divided.")] = None,
) -> None:
    """Restore photographs of any size, trees of folders, and videos; bit depth, alpha, profile, EXIF and sound stay."""
    from train.log import start_logging
    from train.restore.files import How
    from train.restore.restorer import Restorer
    from train.restore.sources import PIPE, find_jobs

    model, photos = _model_first(model, photos)
    piped = out == PIPE or (out is None and photos == [str(PIPE)])
    if as_json and piped:
        raise ValueError("--json and the picture both ask for standard output: give -o FILE")
    piped = piped or as_json
    with contextlib.suppress(AttributeError):  # a name may be no text in this locale: it is shown as it can be
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(stderr=piped)
    start_logging(None, console)
    _refuse_contradictions(tile, whole, overwrite, skip_existing)
    found = find_jobs(photos, out, suffix)
    part = _part(rank, world)
    side = None if whole else tile or "auto"
    how = How(strength, side, ensemble, overwrite, skip_existing, int(max_megapixels * 1e6))
    where = usable_device(device or part.device)
    restorer = Restorer.load(model, where, checkpoint, None if precision == "fp32" else precision)
    with told_now_and_then("restoring …", stderr=piped) as status:
        report = _Report(found, part, console, as_json, status)
        _restore_part(restorer, found, how, part, report)
    report.end(photos, out)


def _model_first(model: str | None, photos: list[str]) -> tuple[str | None, list[str]]:
    """(model, pictures): without --model, a first name that is a model's is the model."""
    from train.checkpoint.saved import RUNS, is_shipped
    from train.restore.names import is_model

    if model is not None:
        return model, photos
    first = Path(photos[0]).expanduser()
    if is_shipped(photos[0]) and len(photos) > 1 and not first.exists():
        return photos[0], photos[1:]
    if is_model(first) or (not first.exists() and len(first.parts) == 1 and is_model(RUNS / first)):
        if len(photos) == 1:
            raise ValueError(f"{photos[0]}: is a model: name the pictures behind it")
        return photos[0], photos[1:]
    return None, photos


def _refuse_contradictions(tile: int | None, whole: bool, overwrite: bool, skip_existing: bool) -> None:
    from train.restore.tiles import SMALLEST_TILE

    if whole and tile is not None:
        raise ValueError("--whole and --tile exclude each other")
    if tile is not None and tile < SMALLEST_TILE:
        raise ValueError(f"--tile {tile}: at least {SMALLEST_TILE} px")
    if overwrite and skip_existing:
        raise ValueError("--overwrite and --skip-existing exclude each other")


class _Part:
    """Which share of the work this process does, and on which device."""

    def __init__(self, rank: int, world: int, device: str | None) -> None:
        self.rank, self.world, self.device = rank, world, device


def _part(rank: int | None, world: int | None) -> _Part:
    import os

    import torch

    from train.engine.launch import place

    if (rank is None) != (world is None):
        raise ValueError("--rank and --world belong together: give both")
    if rank is not None:
        if not 0 <= rank < world:
            raise ValueError(f"--rank {rank} --world {world}: ranks count from 0 to {world - 1}")
        return _Part(rank, world, None)
    found = place(os.environ)
    several = int(found["LOCAL_WORLD_SIZE"]) > 1 and torch.cuda.device_count() > 1
    device = f"cuda:{int(found['LOCAL_RANK']) % torch.cuda.device_count()}" if several else None
    return _Part(int(found["RANK"]), int(found["WORLD_SIZE"]), device)


def _restore_part(restorer: Restorer, found: Found, how: How, part: _Part, report: _Report) -> None:
    """This process's share: every world-th picture, and of each video every world-th piece."""
    from train.restore.files import restore_files

    restore_files(restorer, report.pictures, how, on_done=report.done, on_tile=report.working)
    for job in report.videos:
        from train.restore.video import restore_video

        share = {"rank": part.rank, "world": part.world, "on_frame": partial(report.working, job.source)}
        report.done(restore_video(restorer, job, how, **share))


class _Report:
    """What is said while the work goes on, and at its end."""

    def __init__(self, found: Found, part: _Part, console: Console, as_json: bool, status) -> None:
        self.pictures: list[Job] = [job for job in found.jobs if not job.is_video][part.rank :: part.world]
        self.videos: list[Job] = [job for job in found.jobs if job.is_video]
        self.skipped = found.skipped if part.rank == 0 else []
        self.total = len(self.pictures) + len(self.videos)
        self.counts = {"restored": 0, "there": 0, "failed": 0, "part": 0}
        self.problems: list[str] = []
        self.several = len(found.jobs) + len(found.failed) + len(found.skipped) > 1
        self._console, self._json, self._status = console, as_json, status
        self._begun, self._finished = time.monotonic(), set()
        for source, problem in found.failed if part.rank == 0 else []:
            self._note(source, None, "failed", problem)
        for source in self.skipped:
            self._note(source, None, "skipped", "a kind that is not read")

    def working(self, source: Path, done: int, every: int) -> None:
        """Some of a file's tiles are restored."""
        share = (len(self._finished) + done / every) / self.total
        left = (time.monotonic() - self._begun) * (1 / share - 1)
        place = f"{len(self._finished) + 1} of {self.total}: " if self.total > 1 else ""
        self._status(f"{place}{source.name}: {done} of {every}, about {_span(left)} left")
        if done == every:  # its result is still to be written
            self._finished.add(source)

    def done(self, outcome: Outcome) -> None:
        """A file is restored, or is not going to be."""
        self._finished.add(outcome.source)
        size = {} if outcome.size is None else {"width": outcome.size[0], "height": outcome.size[1]}
        seconds = {} if outcome.seconds is None else {"seconds": round(outcome.seconds, 4)}
        self._note(outcome.source, outcome.target, outcome.status, outcome.problem, **size, **seconds)

    def _note(self, source: Path, target: Path | None, status: str, problem: str | None, **facts) -> None:
        if status in self.counts:
            self.counts[status] += 1
        if status == "failed":
            self.problems.append(problem)
        if self._json:
            place = None if target is None else str(target)
            line = {"source": str(source), "target": place, "status": status, "problem": problem, **facts}
            print(json.dumps(line), flush=True)  # ASCII alone: names may be no text
        elif status == "failed" and self.several:
            self._say(f"error: {problem}")
        elif status == "skipped":
            self._say(f"skipped, {problem}: {source}")

    def end(self, photos: list[str], out: Path | None) -> None:
        """The counts; ValueError where a file failed."""
        counts = self.counts
        text = (
            f"{counts['restored']} restored, {counts['there']} there already, {counts['failed']} failed, "
            f"{len(self.skipped)} skipped"
        )
        if counts["part"]:
            text += f", {counts['part']} videos wait for the pieces of other processes"
        shown = photos[0] if len(photos) == 1 else f"{photos[0]} and {len(photos) - 1} more"
        if self.problems:
            raise ValueError(f"{shown}: {text}" if self.several else self.problems[0])
        self._say(f"{shown if out is None else out}: {text}")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _span(seconds: float) -> str:
    """A time to wait for, as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
