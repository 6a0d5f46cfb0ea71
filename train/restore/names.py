"""Models by name: the shipped one, a run, a checkpoint, an export, or a repository of the Hugging Face cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from model.pretrained import SHIPPED, SHIPPED_NAME, SINGLE, WEIGHTS
from train.checkpoint.saved import RUNS, is_shipped


def find_model(name: str | Path | None) -> Path:
    """The run, folder or .safetensors file that a name stands for; None, or `shipped`: the model that comes with the
    program.

    A name is, the first that fits: a path; a run below runs/; `shipped`; a repository `owner/name` or
    `owner/name@revision` that lies in the Hugging Face cache (nothing is ever downloaded). ValueError, saying what was
    looked for.
    """
    if name is None or is_shipped(name):
        if not SHIPPED.is_file():
            raise ValueError(
                "no model comes with this version of the program: name one with --model (Restorer.load(...)): a run, a "
                f"checkpoint, or an exported {SINGLE} file"
            )
        return SHIPPED
    path = Path(name).expanduser()
    if path.exists():
        if _is_of_cache(path):
            return _of_cache(path)
        return path if is_model(path) or not any(path.glob(f"*{SINGLE}")) else _model_in(path)
    if len(path.parts) == 1 and (RUNS / path).is_dir():
        return RUNS / path
    repository, _, revision = str(name).partition("@")
    if len(path.parts) == 2 and path.suffix != SINGLE:
        try:
            return _model_in(Path(snapshot_download(repository, revision=revision or None, local_files_only=True)))
        except (LocalEntryNotFoundError, HFValidationError):
            pass
    raise ValueError(
        f"{name}: no such model: give a run (its folder, or its name below {RUNS}/), a checkpoint, an exported model "
        f"(sharpprior export), {SHIPPED_NAME} (the one that comes with the program), or owner/name of what lies in the "
        "Hugging Face cache"
    )


def is_model(path: Path) -> bool:
    """Whether a path is a run with a checkpoint, a checkpoint, an exported model, or a repository of the cache."""
    if path.suffix == SINGLE:
        return path.is_file()
    return (path / WEIGHTS).is_file() or (path / "checkpoints").is_dir() or _is_of_cache(path)


def _is_of_cache(path: Path) -> bool:
    """Whether a folder is a repository of the Hugging Face cache, not one of pictures with `snapshots` in it."""
    return path.absolute().name.startswith("models--") and (path / "snapshots").is_dir()


def _of_cache(repository: Path) -> Path:
    """The model of a folder `models--owner--name` of the cache: of its main branch, or its only snapshot."""
    main = repository / "refs" / "main"
    snapshots = sorted((repository / "snapshots").iterdir())
    if main.is_file():
        return _model_in(repository / "snapshots" / main.read_text().strip())
    if len(snapshots) == 1:
        return _model_in(snapshots[0])
    raise ValueError(
        f"{repository}: {len(snapshots)} snapshots and no main branch: name the folder of one, below {repository.name}/"
        "snapshots"
    )


def _model_in(folder: Path) -> Path:
    """The folder itself where it is an exported model, else its only .safetensors file."""
    if (folder / WEIGHTS).is_file():
        return folder if (folder / "config.yaml").is_file() else folder / WEIGHTS
    files = sorted(folder.glob(f"*{SINGLE}"))
    if len(files) != 1:
        raise ValueError(f"{folder}: {len(files)} {SINGLE} files in it: give the one to use")
    return files[0]
