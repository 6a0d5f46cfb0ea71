"""The `sharpprior` command: its parts, and plan, kernels, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from train.cli.cache import app as cache_app
from train.cli.console import wide_console
from train.cli.data import Overwrite
from train.cli.data import app as data_app
from train.cli.demo import app as demo_app
from train.cli.evaluate import app as evaluate_app
from train.cli.experiments import app as experiments_app
from train.cli.networks import app as networks_app
from train.cli.restore import app as restore_app
from train.watch.failure import explained

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Restore and evaluate what train/main.py trained, and prepare data for it.",
)
app.add_typer(restore_app)
app.add_typer(data_app)
app.add_typer(evaluate_app)
app.add_typer(networks_app)
app.add_typer(experiments_app)
app.add_typer(demo_app)
app.add_typer(cache_app, name="cache")
Run = Annotated[Path, typer.Argument(help="Folder of a run, of one of its checkpoints, or of an exported model.")]
Which = Annotated[str, typer.Option("--checkpoint", help="latest, best, or step-N, where RUN is a run.")]


def _plugged(config: Path, overrides: list[str] | None):
    """A run's configuration, with the settings of what it takes over from other runs."""
    from train.checkpoint.plug import with_plugged
    from train.config.file import load_config

    asked = [override.partition("=")[0] for override in overrides or []]
    return with_plugged(load_config(config, overrides or []), asked=asked)


@app.command()
def plan(
    config: Annotated[Path, typer.Option("--config", help="Configuration of the run.")],
    nodes: Annotated[int, typer.Option(help="Nodes.", min=1)] = 1,
    gpus: Annotated[int, typer.Option(help="GPUs a node.", min=1)] = 8,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")] = None,
    tflops: Annotated[float, typer.Option(help="Dense peak of a GPU in the run's precision, TFLOPS.")] = 989.0,
    utilisation: Annotated[float, typer.Option(help="Share of that peak which products and convolutions reach.")] = 0.4,
    hbm: Annotated[float, typer.Option(help="GB/s of a GPU's memory.")] = 3350.0,
    launch: Annotated[float, typer.Option(help="Microseconds an operator takes to launch.")] = 6.0,
    nvlink: Annotated[float, typer.Option(help="GB/s of a GPU inside its node.")] = 450.0,
    network: Annotated[float, typer.Option(help="GB/s of a node to the others, one direction.")] = 400.0,
    latency: Annotated[float, typer.Option(help="Microseconds of a collective without bytes.")] = 30.0,
    storage: Annotated[float, typer.Option(help="GB/s that checkpoints are written with.")] = 2.0,
    memory: Annotated[float, typer.Option(help="GiB a GPU.")] = 80.0,
) -> None:
    """Memory, bytes moved, step time, loader and checkpoints of a run on a cluster, before it is started."""
    from train.plan.cost import Cluster
    from train.plan.report import print_plan

    cluster = Cluster(nodes, gpus, tflops, utilisation, hbm, launch, nvlink, network, latency, storage, memory)
    print_plan(_plugged(config, overrides), cluster, wide_console())


@app.command()
def kernels(
    config: Annotated[Path, typer.Option("--config", help="Configuration of the run.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")] = None,
    ranks: Annotated[int, typer.Option(help="Ranks of the run; its batch is divided among them.", min=1)] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU where there is one.")] = None,
) -> None:
    """List the kernel calls of a run as JSON, for `python -m kernels.check --cases FILE`."""
    import json

    import torch

    from kernels.routes import case_to_json
    from train.plan.kernels import kernel_cases

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = _plugged(config, overrides)
    if run.engine.precision == "auto":
        typer.echo("engine.precision auto: listed as bf16", err=True)
    cases = kernel_cases(run, ranks, where)
    print(json.dumps([case_to_json(case) for case in cases]))


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option("-o", "--out", help="A file NAME.safetensors, .pt2 or .onnx, or a folder.")],
    form: Annotated[
        str,
        typer.Option(
            "--format", help="safetensors; torch (torch.export, .pt2) or onnx: programs of their own; spandrel."
        ),
    ] = "safetensors",
    checkpoint: Which = "latest",
    dtype: Annotated[str, typer.Option(help="fp32, or bf16 for half the size.")] = "fp32",
    prior: Annotated[bool, typer.Option("--prior", help="The prior alone, for train/main.py --prior.")] = False,
    paths: Annotated[
        bool, typer.Option(help="--no-paths: nothing in it names a folder of this machine, for files that others get.")
    ] = True,
    overwrite: Overwrite = False,
) -> None:
    """Write the averaged model, or its prior alone, as files that load without DeepSpeed and without the run."""
    from model.names import choose
    from train.checkpoint.export import export_model
    from train.checkpoint.program import SUFFIXES, export_program
    from train.checkpoint.saved import describe

    form = choose("format", form, ("safetensors", "spandrel", *SUFFIXES))
    if prior and form != "safetensors":
        raise ValueError(f"--prior: the prior alone is written as safetensors, not as {form}")
    if not paths and form in SUFFIXES:
        raise ValueError(f"--no-paths: {form} holds no paths")
    if form in SUFFIXES:
        if dtype != "fp32":
            raise ValueError(f"--dtype {dtype}: {form} is written in fp32")
        source = export_program(run, out, form, which=checkpoint, overwrite=overwrite)
    else:
        how = {"which": checkpoint, "dtype": dtype, "prior": prior, "overwrite": overwrite, "paths": paths}
        source = export_model(run, out, **how, spandrel=form == "spandrel")
    text = f"exported {'the prior of ' if prior else ''}{describe(source)} of {run} as {dtype}: {out}"
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of the console script: one line and a status for what the user can mend."""
    sys.exit(explained(app))


if __name__ == "__main__":
    main()
