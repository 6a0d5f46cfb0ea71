"""`sharpprior demo`: a web page to try models on."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from train.cli.console import usable_device

app = typer.Typer()


@app.command()
def demo(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models to choose from: runs, checkpoints, exported files, shipped; default: the shipped one."
        ),
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="latest, best, or step-N, of models that are runs.")] = "latest",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: a GPU where there is one.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: fp32.")] = None,
    host: Annotated[str, typer.Option(help="Address to serve on; default: this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.", min=1, max=65535)] = 7860,
    megabytes: Annotated[float, typer.Option(help="Largest file that may be uploaded.")] = 50.0,
    megapixels: Annotated[float, typer.Option(help="Largest picture.")] = 25.0,
    waiting: Annotated[int, typer.Option(help="Longest queue; who comes later is told to come back.")] = 16,
    minutes: Annotated[float, typer.Option(help="How long a visitor's pictures are kept.")] = 30.0,
) -> None:
    """Serve a page to restore photographs, and to play with blur whose sharp original is known."""
    from train.demo.limits import Limits
    from train.demo.serve import serve
    from train.log import start_logging

    start_logging(None, Console())
    serve(
        models or [None], device=usable_device(device), checkpoint=checkpoint, precision=precision,
        limits=Limits(megabytes, megapixels, waiting, minutes), host=host, port=port,
    )  # fmt: skip
