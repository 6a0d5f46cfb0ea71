"""`sharpprior evaluate` and `sharpprior compare`: numbers that can be pasted, and what two models differ by."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from data.prepare.layouts import LAYOUTS
from train.cli.console import QUIET_S, say, usable_device
from train.cli.data import Overwrite

app = typer.Typer()
DATA = ", ".join(f"{name}:PATH" for name in LAYOUTS if name != "folder")


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="A run, one of its checkpoints, an exported model, or owner/name.")],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SET", help=f"{DATA}, synth:PATH or a shard set; default: the model's own validation set."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder of the results; default: RUN/evaluations/<data>-<step>.")
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="latest, best, or step-N, where RUN is a run.")] = "latest",
    split: Annotated[str | None, typer.Option(help="train, test, val …; default: what papers report.")] = None,
    variant: Annotated[str | None, typer.Option(help="Which blurry pictures, such as blur_gamma of GoPro.")] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Accept a number of pairs other than the release's.")
    ] = False,
    blurry: Annotated[str | None, typer.Option(help="Of pairs, the folder of the blurry pictures.")] = None,
    sharp: Annotated[str | None, typer.Option(help="Of pairs, the folder of the sharp pictures.")] = None,
    pairs_list: Annotated[
        Path | None, typer.Option("--list", help="Of pairs, a file of lines <sharp> <blurry>, paths below PATH.")
    ] = None,
    max_pairs: Annotated[
        int | None, typer.Option(min=1, help="Of so many pairs, drawn over all scenes in proportion.")
    ] = None,
    per_tier: Annotated[
        int | None, typer.Option(min=1, help="Of a shard set, pairs per photograph and tier; default: the model's.")
    ] = None,
    crop: Annotated[
        int | None, typer.Option(min=32, help="Of a shard set, side of the crops, px; default: the model's.")
    ] = None,
    tile: Annotated[
        str, typer.Option(metavar="PX|whole|auto", help="Tiles; auto: the whole picture where memory allows.")
    ] = "auto",
    precision: Annotated[
        str | None, typer.Option(help="fp32 or bf16; default: what the model was trained with.")
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="A metric beside those that are always measured, such as classes.")
    ] = None,
    deconvolution: Annotated[
        bool, typer.Option(help="Of crops, also what is told the kernel: a bound, and half of the time.")
    ] = True,
    baselines: Annotated[
        Path | None,
        typer.Option(help="File of what is known of inputs and smoothing, added to: other models need not measure it."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that align RealBlur's pictures; default: one a core.")
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep every restored picture, in restored/.")] = False,
    overwrite: Overwrite = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: a GPU where there is one.")] = None,
) -> None:
    """PSNR, SSIM and more on a test set, with intervals, against what needs no model; goes on after any stop.

    Started by torchrun, accelerate or srun, the ranks share the pictures.
    """
    from train.checkpoint.saved import describe
    from train.engine.launch import place
    from train.evaluate import telling
    from train.evaluate.asked import default_folder, open_pairs
    from train.evaluate.book import RESULTS
    from train.evaluate.offline import Evaluating, Settings, Tested, finish
    from train.evaluate.results import read_results
    from train.log import start_logging

    if (blurry is None) != (sharp is None):
        raise ValueError("--blurry and --sharp name the two folders of pairs: give both")
    start_logging(None, _console())
    found = place(os.environ)
    rank, world = int(found["RANK"]), int(found["WORLD_SIZE"])
    where = usable_device(_own_device(device, int(found["LOCAL_RANK"]), int(found["LOCAL_WORLD_SIZE"])))
    model = Tested.load(run, checkpoint, where)
    pairs = open_pairs(
        data,
        model.config,
        split=split,
        variant=variant,
        partial=partial,
        folders=(blurry, sharp) if blurry and sharp else None,
        pairs_list=pairs_list,
        per_tier=per_tier,
        crop=crop,
        max_pairs=max_pairs,
    )
    folder = out or default_folder(model.source, pairs, describe(model.source))
    cores = max(1, len(os.sched_getaffinity(0)) // int(found["LOCAL_WORLD_SIZE"]))
    shared = {"workers": workers or cores, "rank": rank, "world": world}
    shared |= {"deconvolution": deconvolution, "baselines": baselines, "save": save}
    how = Settings(tile=_tile(tile), precision=precision, also=tuple(also or ()), **shared)
    evaluation = Evaluating(model, pairs, folder, where, how, overwrite=overwrite)
    todo = len(evaluation.todo())
    if rank == 0:
        say(f"model: {model.source} ({describe(model.source)})  data: {pairs.facts['set']}, {pairs.label}")
        shared = f", shared by {world} ranks" if world > 1 else ""
        say(f"{telling.count(len(pairs.items), 'pair')}{shared}, {todo} to do here; results go to {folder}")
    with _progress(f"rank {rank}: " if world > 1 else "", todo) as moved:
        done = evaluation.run(lambda item, why: moved(why))
    if done == 0 and (folder / RESULTS).exists():
        results = read_results(folder)
        say("all pictures were evaluated before: nothing is done again (--overwrite begins anew)")
    else:
        results = finish(evaluation)
    if results is None:
        left = len(pairs.items) - len(evaluation.book.records())
        say(f"rank {rank}: done; {left} pictures of other ranks are not: whoever ends last writes the results")
        return
    for line in telling.lines(results):
        say(line)
    say(f"results: {folder / RESULTS}, report: {folder / 'report.html'}")
    if results["failed"]:
        number = telling.count(len(results["failed"]), "picture")
        raise ValueError(
            f"{number} could not be evaluated (above, and in {folder / RESULTS}); the others are in the results"
        )


def _tile(text: str):
    from train.restore.tiles import SMALLEST_TILE

    if text in ("auto", "whole"):
        return text
    if not text.isdigit() or int(text) < SMALLEST_TILE:
        raise ValueError(f"--tile {text}: auto, whole, or a side of at least {SMALLEST_TILE} px")
    return int(text)


def _own_device(name: str | None, local: int, local_world: int) -> str | None:
    """The rank's own GPU among several; a CPU's cores are shared among the ranks of a machine."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in (None, "cuda") and gpus > 1 and local_world > 1:
        return f"cuda:{local % gpus}"
    if (name == "cpu" or not gpus) and local_world > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    return name


def _console():
    from rich.console import Console

    return Console()


@contextmanager
def _progress(before: str, todo: int) -> Iterator[Callable[[str | None], None]]:
    """Called after every picture with why it failed, or None: a bar with the time left at a terminal, elsewhere a line
    now and then."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = _console()
    columns = (
        TextColumn(f"{before}restoring"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    started = last = time.monotonic()
    done = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        row = bar.add_task("", total=todo)

        def moved(why: str | None) -> None:
            nonlocal done, last
            done += 1
            bar.advance(row)
            now = time.monotonic()
            if why is not None:
                say(f"{before}failed: {why}")
            if not console.is_terminal and (now - last >= QUIET_S or done == todo):
                last = now
                left = (now - started) / done * (todo - done)
                say(f"{before}{done} of {todo} pictures, {(now - started) / done:.2f} s each, {_duration(left)} left")

        yield moved


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


@app.command()
def compare(
    evaluations: Annotated[
        list[Path],
        typer.Argument(help="Folders that evaluate wrote, their results.json, or runs. The first is the base."),
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for compare.md, .tex, .json and .html.")
    ] = None,
    latex: Annotated[bool, typer.Option("--latex", help="Print the table for LaTeX instead of Markdown.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Paired differences of evaluations of the same pictures, with intervals over scenes, as a table to paste."""
    import json

    from train.evaluate import compared
    from train.evaluate.compare import compare as compare_loaded
    from train.evaluate.compare import load_all

    if out is not None and (out / "compare.json").exists() and not overwrite:
        raise ValueError(f"{out / 'compare.json'}: exists: choose another folder, or --overwrite")
    comparison = compare_loaded(load_all(evaluations))
    print(compared.latex(comparison) if latex else compared.markdown(comparison), end="")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        compared.write_text(out / "compare.md", compared.markdown(comparison))
        compared.write_text(out / "compare.tex", compared.latex(comparison))
        compared.write_page(out / "compare.html", comparison)
        compared.write_text(
            out / "compare.json", json.dumps(compared.as_json(comparison), indent=1, allow_nan=False) + "\n"
        )
