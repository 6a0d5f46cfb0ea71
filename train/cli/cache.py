"""The `sharpprior cache` commands: what the teacher-feature cache holds, whether it is sound, deleting it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from train.cli.console import progress, say

app = typer.Typer(no_args_is_help=True, help="Look at, check and delete cached teacher features.")
Root = Annotated[Path | None, typer.Argument(help="features.folder of the run; default: where runs put it.")]


def _root(given: Path | None) -> Path:
    from data.feature_cache.folders import default_root

    if given is not None and not given.is_dir():
        raise ValueError(f"{given}: no such folder; name the one that features.folder names")
    return given or default_root()


@app.command()
def stats(root: Root = None) -> None:
    """Every folder of the cache: teacher, form, records, size, whether a run writes to it."""
    from data.feature_cache.folders import survey

    root = _root(root)
    folders = survey(root)
    for folder in folders:
        for line in folder.lines():
            say(line)
    total = sum(folder.bytes for folder in folders)
    say(f"{root}: {len(folders)} folder{'' if len(folders) == 1 else 's'}, {total / 2**20:.1f} MiB")


@app.command()
def verify(root: Root = None) -> None:
    """Read every record and check it; status 1 where something is damaged (a run skips it by itself)."""
    from data.feature_cache.folders import verify as verified

    root = _root(root)
    with progress("verifying") as moved:
        folders = verified(root, moved)
    problems = [problem for folder in folders for problem in folder.damaged]
    for problem in problems:
        say(problem)
    if problems:
        raise ValueError(f"{root}: {len(problems)} problem{'' if len(problems) == 1 else 's'}")
    say(f"{root}: {sum(folder.records for folder in folders)} records, sound")


@app.command()
def clear(
    root: Root = None,
    only: Annotated[str | None, typer.Option(help="Start of the fingerprint of the one folder to delete.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Also while a run writes to it.")] = False,
) -> None:
    """Delete the cache's folders; other files are left alone."""
    from data.feature_cache.folders import clear as cleared

    root = _root(root)
    gone, freed = cleared(root, only, force=force)
    say(f"{root}: {len(gone)} folder{'' if len(gone) == 1 else 's'} deleted, {freed / 2**20:.1f} MiB")
