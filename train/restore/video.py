"""Restore a video piece by piece, so that a stopped one goes on, and several processes share one."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from model.pretrained import WEIGHTS
from train.restore.files import How, Outcome, problem_of
from train.restore.movie import EXACT, FORMATS, Film, frames_of, join, open_film, try_sound, write_piece
from train.restore.picture import PictureError
from train.restore.restorer import Restorer
from train.restore.sources import PARTS, Job

PIECE = 48  # frames: what is lost where a process is stopped


def restore_video(
    restorer: Restorer,
    job: Job,
    how: How,
    *,
    rank: int = 0,
    world: int = 1,
    on_frame: Callable[[int, int], None] = lambda done, all_: None,
) -> Outcome:
    """Restore a video: its frames keep their time stamps, its sound is copied.

    Pieces of `PIECE` frames are kept in a folder beside the target whose name says which video, model and settings
    they are of, until they are joined: by the process that finds all of them there. Of `world` processes each makes
    every world-th piece; if one is lost, any later call makes what is missing. `on_frame(done, all)` of this process'
    frames. The outcome is `part` where others are still at work.
    """
    try:
        return _restore(restorer, job, how, rank, world, on_frame)
    except PictureError as error:
        return Outcome(job.source, job.target, "failed", str(error))
    except OSError as error:
        where = error.filename or job.target
        return Outcome(job.source, job.target, "failed", f"{where}: cannot be written: {error.strerror or error}")
    except Exception as error:  # whatever it is, the other files are none the worse
        return Outcome(job.source, job.target, "failed", problem_of(error, job.source))


def _restore(
    restorer: Restorer, job: Job, how: How, rank: int, world: int, on_frame: Callable[[int, int], None]
) -> Outcome:
    source, target = job
    if target.suffix.lower() not in FORMATS:
        raise PictureError(f"{target}: videos are written as {', '.join(FORMATS)}")
    if target.exists() and how.skip_existing:
        return Outcome(source, target, "there")
    film, start = open_film(source), time.perf_counter()
    count = len(film.stamps)
    firsts = range(0, count, PIECE)
    mine = range(rank, len(firsts), world)
    if not mine:  # of a short video the others may have joined all that there is
        return Outcome(source, target, "part")
    if target.exists() and not how.overwrite:
        raise PictureError(f"{target}: exists: choose another name, --overwrite, or --skip-existing")
    try_sound(film, target)
    folder = target.with_name(f"{target.name}.{_fingerprint(restorer, film, how)}{PARTS}")
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [folder / f"{first:08d}.mkv" for first in firsts]
    frames = sum(min(PIECE, count - number * PIECE) for number in mine)
    done, size = 0, None

    def restored(first: int, last: int) -> Iterator[np.ndarray]:
        nonlocal done
        for pixels in frames_of(film, first, last):
            image = torch.from_numpy(pixels).permute(2, 0, 1)
            settings = {"strength": how.strength, "tile": how.tile, "ensemble": how.ensemble}
            yield restorer.restore(image, **settings).permute(1, 2, 0).contiguous().numpy()
            done += 1
            on_frame(done, frames)

    for number in mine:
        first, last = number * PIECE, min((number + 1) * PIECE, count)
        if pieces[number].exists():
            frames -= last - first
            continue
        size = write_piece(pieces[number], film, restored(first, last))
    if not all(piece.exists() for piece in pieces) or not _join_alone(film, folder, pieces, target):
        return Outcome(source, target, "part", size=size, seconds=time.perf_counter() - start)
    return Outcome(source, target, "restored", size=size, seconds=time.perf_counter() - start)


def _join_alone(film: Film, folder: Path, pieces: list[Path], target: Path) -> bool:
    """Join the pieces and remove them; False where another process is at it."""
    with (
        contextlib.suppress(FileNotFoundError),
        open(folder / "join.lock", "w") as lock,
    ):  # gone: another one has joined
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        join(film, pieces, target)
        shutil.rmtree(folder)
        return True
    return False


def _fingerprint(restorer: Restorer, film: Film, how: How) -> str:
    """Of all that decides the restored frames: video, weights, settings."""
    digest = hashlib.blake2b(digest_size=6)
    with open(film.path, "rb") as file:
        digest.update(file.read(1 << 20))
    weights = restorer.source / WEIGHTS if restorer.source and restorer.source.is_dir() else restorer.source
    if weights is not None:
        with open(weights, "rb") as file:
            digest.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
    settings = [film.path.stat().st_size, film.stamps, how.strength, how.ensemble, how.tile, restorer.tile]
    digest.update(json.dumps([*settings, str(restorer.precision), PIECE, EXACT]).encode())
    return digest.hexdigest()
