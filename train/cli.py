"""The `sharpprior` command: restore, evaluate, preview, verify, index. Training is `train/main.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from train.failure import explained

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Run = Annotated[Path, typer.Argument(help="Folder of a run, of one of its checkpoints, or of an exported model.")]
Which = Annotated[str, typer.Option("--checkpoint", help="latest, best, or step-N, where RUN is a run.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: a GPU where there is one.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")]
BlurSource = Annotated[Path | None, typer.Option("--config", help="Take the blur from this configuration.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of it.")]


def _device(name: str | None):
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


@app.command()
def restore(
    run: Run,
    photo: Annotated[Path, typer.Argument(help="A picture, or a folder of pictures.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The restored picture, or the folder for a folder.")],
    checkpoint: Which = "latest",
    tile: Annotated[int | None, typer.Option(help="Side of tiles, px; default: 1.5 times the training crop.")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="No tiles: the picture in one piece.")] = False,
    overwrite: Overwrite = False,
    device: Device = None,
) -> None:
    """Restore photographs of any size; bit depth, alpha, colour profile and EXIF stay."""
    from rich.console import Console

    from train.restore import SMALLEST_TILE, default_tile, restore_all
    from train.run_folder import start_logging
    from train.saved import load_model

    console = Console()
    start_logging(None, console)
    if whole and tile is not None:
        raise ValueError("--whole and --tile exclude each other")
    if tile is not None and tile < SMALLEST_TILE:
        raise ValueError(f"--tile {tile}: at least {SMALLEST_TILE} px")
    if not photo.exists():
        raise ValueError(f"{photo}: no such file or folder")
    network, config, _ = load_model(run, _device(device), checkpoint)
    side = None if whole else tile or default_tile(config)
    problems = []
    with console.status("restoring …") as status:

        def told(path: Path, problem: str | None) -> None:
            status.update(f"{path.name}")
            if problem is not None:
                problems.append(problem)
                console.print(f"error: {problem}", markup=False, soft_wrap=True, style="red")

        failed = restore_all(network, photo, out, tile=side, overwrite=overwrite, on_file=told)
    if failed:
        raise ValueError(problems[0] if not photo.is_dir() else f"{failed} pictures of {photo} were not restored")
    console.print(f"restored: {out}", markup=False, soft_wrap=True)


@app.command()
def evaluate(
    run: Run,
    data: Annotated[str | None, typer.Option(help="Shard set; default: the validation set of the run.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for report.md and panel.png.")] = None,
    checkpoint: Which = "latest",
    per_tier: Annotated[int | None, typer.Option(help="Pairs per photograph and tier; default: the run's.")] = None,
    crop: Annotated[int | None, typer.Option(help="Side of the crops, px; default: the run's.")] = None,
    overwrite: Overwrite = False,
    device: Device = None,
) -> None:
    """Gain over the blurry input per severity tier, with intervals."""
    from train.offline import evaluate_saved

    evaluate_saved(
        run, data=data, out=out, which=checkpoint, per_tier=per_tier, crop=crop, overwrite=overwrite,
        device=_device(device),
    )  # fmt: skip


@app.command()
def preview(
    shards: Annotated[str | None, typer.Argument(help="Shard set; default: the bundled photographs.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Contact sheet (.png or .jpg) or page (.html).")] = Path(
        "preview.png"
    ),
    count: Annotated[int, typer.Option(min=1, help="Pairs to show.")] = 12,
    crop: Annotated[int, typer.Option(min=32, help="Side of the crops, px.")] = 256,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    config: BlurSource = None,
    set_: Sets = None,
    overwrite: Overwrite = False,
) -> None:
    """Contact sheet of synthesized pairs: sharp, blurry, kernel, extent, PSNR."""
    from rich.console import Console

    from data.preview import preview_pairs, write_contact_sheet, write_html_page
    from train.config import Config
    from train.config_file import load_config, override
    from train.sources import BUNDLED

    if out.exists() and not overwrite:
        raise ValueError(f"{out}: exists: choose another name, or --overwrite")
    settings = load_config(config, set_ or []) if config else override(Config(), set_ or [])
    pairs = preview_pairs(shards or str(BUNDLED / "train"), settings.blur, count=count, crop=crop, seed=seed)
    if out.suffix.lower() == ".html":
        write_html_page(out, pairs)
    else:
        write_contact_sheet(out, pairs)
    Console().print(f"{len(pairs)} pairs: {out}", markup=False, soft_wrap=True)


@app.command()
def verify(
    shards: Annotated[str, typer.Argument(help="Folder of a shard set.")],
    decode: Annotated[bool, typer.Option(help="Decode every picture too; --no-decode stops at the hashes.")] = True,
) -> None:
    """Prove a shard set against its index: every shard, byte and picture."""
    from rich.console import Console

    from data.verify import verify as problems_of

    console = Console()
    problems = problems_of(shards, decode=decode)
    for problem in problems:
        console.print(problem, markup=False, soft_wrap=True)
    if problems:
        raise ValueError(f"{shards}: {len(problems)} problems")
    console.print(f"{shards}: sound", markup=False, soft_wrap=True)


@app.command()
def index(
    shards: Annotated[Path, typer.Argument(help="Folder of .tar shards that have no index.json yet.")],
    overwrite: Overwrite = False,
) -> None:
    """Write the index of shards that another program made."""
    from data.verify import index_folder

    print(index_folder(shards, overwrite=overwrite))


def main() -> None:
    """Entry point of the console script: one line and a status for what the user can mend."""
    sys.exit(explained(app))


if __name__ == "__main__":
    main()
