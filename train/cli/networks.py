"""`sharpprior models` and `sharpprior import`: the networks there are, and official checkpoints of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from train.cli.console import say, usable_device, wide_console
from train.cli.data import Overwrite

app = typer.Typer()


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="Checkpoint of the official release, .pth or .safetensors.")],
    backbone: Annotated[str, typer.Option(help="Preset or backbone that it is of (`sharpprior models --list`).")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder, or a file NAME.safetensors.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the backbone: width=48."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a model of an official checkpoint: to restore with, evaluate, or finetune (model.backbone_from).

    Wrappers (params, params_ema, state_dict, module.) are seen through; nothing in the file is executed.
    """
    from train.checkpoint.official import import_official

    settings = {}
    for override in overrides or []:
        key, found, value = override.partition("=")
        if not found:
            raise ValueError(f"--set {override}: expected KEY=VALUE")
        settings[key] = yaml.safe_load(value)
    network = import_official(file.expanduser(), backbone, settings, out.expanduser(), overwrite=overwrite)
    count = sum(parameter.numel() for parameter in network.parameters())
    say(f"{out}: {backbone} of {count / 1e6:.2f} M parameters from {file}")


@app.command()
def models(
    names: Annotated[list[str] | None, typer.Argument(help="Networks to measure; default: all.")] = None,
    only_list: Annotated[bool, typer.Option("--list", help="Name them, measure nothing.")] = False,
    config: Annotated[
        Path, typer.Option("--config", help="Configuration whose prior is put in; default: configs/large.yaml.")
    ] = Path("configs/large.yaml"),
    sizes: Annotated[str, typer.Option(help="Sizes to time, width×height px.")] = "256x256,1280x720",
    device: Annotated[str | None, typer.Option(help="cpu, cuda …; default: a GPU where there is one.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds that one measurement may take.")] = 300.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here too.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="PNG: MACs against milliseconds.")] = None,
) -> None:
    """Parameters, MACs, milliseconds and memory of the networks here, without and with the prior."""
    from rich.table import Table

    from model.backbones import BACKBONES
    from model.names import choose
    from train import ROOT
    from train.config.file import load_config
    from train.plan.networks import as_json, costs, network_names, plot

    known = network_names()
    chosen = [choose("network", name, [*known, *BACKBONES]) for name in names or known]
    if only_list:
        return say("\n".join(chosen))
    asked = [_size(text) for text in sizes.split(",")]
    where = str(usable_device(device))
    for file in (json_file, plot_file):
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"{file}: {file.parent} is no folder")
    path = config if config.exists() else ROOT / config
    table = Table("network", "parameters, M", "GMACs at 256²", title=f"On {where}, one image")
    for height, width in asked:
        for unit in ("ms", "MiB"):
            table.add_column(f"{unit} at {width}×{height}", justify="right")
    table.add_column("prior's MACs")
    rows, problems = [], []
    for row in costs(chosen, load_config(path, []).model, asked, where, limit):
        measured = [f"{value:,.0f}" if value else "–" for pair in zip(row.ms, row.mib, strict=True) for value in pair]
        more = f"+{row.macs / rows[-1].macs - 1:.1%}" if row.prior else ""
        name = f"{row.name} + prior" if row.prior else row.name
        table.add_row(name, f"{row.parameters / 1e6:.2f}", f"{row.macs / 1e9:.1f}", *measured, more)
        problems += [f"{name}: {row.why}"] if row.why else []
        rows.append(row)
        if json_file is not None:
            json_file.write_text(as_json(rows, where) + "\n")
    wide_console().print(table)
    for problem in problems:
        say(f"not measured: {problem}")
    if plot_file is not None:
        plot(rows, plot_file)


def _size(text: str) -> tuple[int, int]:
    """(height, width) of WIDTHxHEIGHT."""
    width, found, height = text.strip().lower().replace("×", "x").partition("x")
    if not (found and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ValueError(f"--sizes {text}: expected WIDTHxHEIGHT, such as 1280x720")
    return int(height), int(width)
