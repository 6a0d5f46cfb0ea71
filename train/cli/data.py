"""The `sharpprior` commands about data: prepare, verify, index, stats, preview."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data.prepare.layouts import LAYOUTS
from train.cli.console import progress, say

app = typer.Typer()
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what exists.")]
BlurSource = Annotated[Path | None, typer.Option("--config", help="Take the blur from this configuration.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of it.")]
Shards = Annotated[str | None, typer.Argument(help="Shard set, folder or URL; default: what a run would train on.")]


def _settings(path: Path | None, changes: list[str] | None):
    """The configuration that a command's --config and --set give."""
    from train.config.file import configure, load_config

    return load_config(path, changes or []) if path else configure(changes or [])


def _open(shards: str | None, settings):
    """The set that is named, or the first that a run of this configuration would train on."""
    from train.config.sources import data_sources, open_set

    return open_set(shards or data_sources(settings)[0][0].path, settings)


def _levels(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--levels {text}: expected odd numbers with commas, such as 7,11,15") from None


@app.command()
def prepare(
    layout: Annotated[str, typer.Argument(metavar="LAYOUT", help=f"{', '.join(LAYOUTS)} or video.")],
    root: Annotated[Path, typer.Argument(help="The data set's folder as released, a folder of pictures, or a video.")],
    out: Annotated[Path, typer.Argument(help="Folder of the shard set to write.")],
    split: Annotated[str | None, typer.Option(help="train, test, val …; default: the layout's first.")] = None,
    variant: Annotated[str | None, typer.Option(help="Which blurry pictures, such as blur_gamma of GoPro.")] = None,
    blurry: Annotated[str | None, typer.Option(help="Of pairs, the folder of the blurry pictures.")] = None,
    sharp: Annotated[str | None, typer.Option(help="Of pairs, the folder of the sharp pictures.")] = None,
    pairs_list: Annotated[
        Path | None, typer.Option("--list", help="Of pairs, a file of lines <sharp> <blurry>, paths below ROOT.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Accept a number of pairs other than the release's.")
    ] = False,
    levels: Annotated[
        str | None, typer.Option(help="Average windows of so many frames, such as 7,11,15,19,23,31.")
    ] = None,
    stride: Annotated[int, typer.Option(min=0, help="Frames between windows; 0: one after another.")] = 0,
    max_flow: Annotated[float, typer.Option(help="Largest motion between frames, px.")] = 1.5,
    flow: Annotated[str, typer.Option(help="Above it: interpolate or refuse.")] = "interpolate",
    curve: Annotated[str, typer.Option(help="The camera's response: srgb or gamma (2.2, as GoPro's pairs).")] = "srgb",
    sharp_only: Annotated[bool, typer.Option("--sharp-only", help="Of pairs, keep the sharp pictures.")] = False,
    tile: Annotated[int, typer.Option(help="Largest side of a tile, px; 0: pictures stay whole.")] = 768,
    min_size: Annotated[int, typer.Option(help="Leave out pictures with a smaller side, px.")] = 0,
    png: Annotated[bool, typer.Option("--png", help="Tiles of photographs as PNG instead of JPEG.")] = False,
    quality: Annotated[int, typer.Option(help="JPEG quality of tiles (4:4:4).")] = 95,
    shard_mib: Annotated[int, typer.Option(min=1, help="A shard ends at this size, MiB.")] = 512,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")] = None,
    max_bad_fraction: Annotated[float, typer.Option(help="Part of the sources that may be unreadable.")] = 0.0,
    overwrite: Overwrite = False,
) -> None:
    """Write a shard set from a data set as released, from folders of photographs or pairs, or from video.

    Goes on after a kill.
    """
    import os

    from data.prepare.jobs import prepare_dataset
    from data.prepare.recipe import Recipe
    from data.prepare.windows import Windows

    if (blurry is None) != (sharp is None):
        raise ValueError("--blurry and --sharp name the two folders of pairs: give both")
    chosen = _levels(levels)
    frames = chosen is not None or layout == "video"
    of_pictures = {"--sharp-only": sharp_only, "--png": png, "--partial": partial}
    of_windows = {"--stride": stride, "--max-flow": max_flow != 1.5, "--flow": flow != "interpolate"}
    ignored = of_pictures if frames else of_windows | {"--curve": curve != "srgb"}
    for name, given in ignored.items():
        if given:
            raise ValueError(
                f"{name} says nothing {'of windows of frames' if frames else 'without --levels'}: leave it out"
            )
    windows = None
    if frames:
        numbers = {"levels": chosen} if chosen is not None else {}
        windows = Windows(**numbers, stride=stride, max_flow=max_flow, flow=flow, curve=curve)
    pictures = {"tile": tile, "png": png, "quality": quality, "min_size": min_size, "sharp_only": sharp_only}
    recipe = Recipe(**pictures, windows=windows, shard_bytes=shard_mib << 20)
    asked = {"split": split, "variant": variant, "partial": partial, "overwrite": overwrite}
    asked |= {"folders": (blurry, sharp) if blurry and sharp else None, "pairs_list": pairs_list}
    limits = {"workers": workers or len(os.sched_getaffinity(0)), "max_bad_fraction": max_bad_fraction}
    with progress(layout, transient=False) as moved:
        done = prepare_dataset(layout, root, out, recipe, **asked, **limits, progress=moved)
    for name, items in (("too small", done.small), ("refused", done.refused), ("unreadable", done.bad)):
        shown = items if name == "unreadable" else items[:10]
        for item in shown:
            say(f"{name}: {item}")
        if len(items) > len(shown):
            say(f"{name}: {len(items) - len(shown)} more")
    if done.junk:
        say(f"skipped: {done.junk} files that systems leave behind (._x.png, Thumbs.db and such)")
    taken = f" ({done.reused_jobs} jobs taken over from an earlier run)" if done.reused_jobs else ""
    say(f"{done.samples} samples in {done.shards} shards, {done.bytes / 2**20:.1f} MiB: {done.root}{taken}")


@app.command()
def verify(
    shards: Annotated[str, typer.Argument(help="Folder of a shard set.")],
    decode: Annotated[bool, typer.Option(help="Decode every picture too; --no-decode stops at the hashes.")] = True,
) -> None:
    """Prove a shard set against its index: every shard, byte and picture."""
    from data.shards.verify import verify as problems_of
    from train.config.file import configure

    cache = _open(shards, configure([])).cache if "://" in shards else None
    with progress("verifying") as moved:
        problems = problems_of(shards, decode=decode, cache=cache, progress=moved)
    for problem in problems:
        say(problem)
    if problems:
        raise ValueError(f"{shards}: {len(problems)} problem{'s' if len(problems) > 1 else ''}")
    say(f"{shards}: sound")


@app.command()
def index(
    shards: Annotated[Path, typer.Argument(help="Folder of .tar shards that another program made.")],
    roles: Annotated[
        str | None,
        typer.Option(metavar="NAME=ROLE,…", help="What names of pictures mean: input=blurry,target=sharp,mask=skip."),
    ] = None,
    add: Annotated[bool, typer.Option("--add", help="Take in the shards that the index does not name yet.")] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out what does not decode or is no photograph or pair.")
    ] = False,
    min_size: Annotated[int, typer.Option(min=0, help="Leave out pictures with a smaller side, px.")] = 0,
    dotted: Annotated[
        bool, typer.Option("--dotted", help="x.one.png and x.two.png are two photographs, not one sample.")
    ] = False,
    decode: Annotated[bool, typer.Option(help="Decode every picture; --no-decode reads their headers alone.")] = True,
    overwrite: Overwrite = False,
) -> None:
    """Write the index of shards that another program made: any keys, photographs or pairs."""
    from data.shards.index import index_folder
    from data.shards.names import Naming, given_roles

    naming = Naming(given_roles(roles), dotted)
    how = {"add": add, "skip_bad": skip_bad, "min_size": min_size, "decode": decode, "overwrite": overwrite}
    with progress("indexing", transient=False) as moved:
        found = index_folder(shards, naming=naming, **how, progress=moved)
    for line in found.bad:
        say(f"left out: {line}")
    kind = f"{found.pairs} recorded pairs" if found.pairs else f"{found.samples} photographs"
    left = [f"{len(found.bad)} bad", f"{len(found.small)} smaller than {min_size} px", f"{found.others} other files"]
    say(f"{found.path}: {kind} in {found.shards} shards; left out: {', '.join(left)}")


@app.command()
def stats(
    shards: Shards = None,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs to draw.")] = 512,
    crop: Annotated[int | None, typer.Option(min=32, help="Side of the crops, px; default: data.crop.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Default: run.seed.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 0,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Histogram of extents (.png).")] = None,
    config: BlurSource = None,
    set_: Sets = None,
    overwrite: Overwrite = False,
) -> None:
    """Severity histogram, input PSNR per tier and sizes of what a run would train on."""
    from data.look.stats import set_stats, write_histogram
    from data.stream.config import StreamConfig

    if out is not None and out.exists() and not overwrite:
        raise ValueError(f"{out}: exists: choose another name, or --overwrite")
    settings = _settings(config, set_)
    # Not the run's groups and windows: they are of its batches and ranks, and say nothing about a set.
    stream = StreamConfig(crop=crop or settings.data.crop, margin=settings.data.margin, workers=workers)
    seed = settings.run.seed if seed is None else seed
    found = set_stats(_open(shards, settings), settings.blur, stream, pairs=pairs, seed=seed)
    for line in found.lines():
        say(line)
    if out is not None:
        say(str(write_histogram(out, found)))


@app.command()
def preview(
    shards: Shards = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Contact sheet (.png or .jpg) or page (.html).")] = Path(
        "preview.png"
    ),
    count: Annotated[int, typer.Option(min=1, help="Pairs to show.")] = 12,
    crop: Annotated[int | None, typer.Option(min=32, help="Side of the crops, px; default: data.crop.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Default: run.seed.")] = None,
    config: BlurSource = None,
    set_: Sets = None,
    overwrite: Overwrite = False,
) -> None:
    """Contact sheet of synthesized pairs: sharp, blurry, kernel, extent, PSNR."""
    from data.blur import TIERS
    from data.look.preview import preview_pairs, write_contact_sheet, write_html_page

    if out.exists() and not overwrite:
        raise ValueError(f"{out}: exists: choose another name, or --overwrite")
    settings = _settings(config, set_)
    tiers = [tier for tier in TIERS if getattr(settings.blur.tiers, tier).share > 0]
    shown = {"crop": crop or settings.data.crop, "margin": settings.data.margin, "tiers": tiers, "count": count}
    seed = settings.run.seed if seed is None else seed
    pairs = preview_pairs(_open(shards, settings), settings.blur, seed=seed, **shown)
    (write_html_page if out.suffix.lower() == ".html" else write_contact_sheet)(out, pairs)
    say(f"{len(pairs)} pairs: {out}")
