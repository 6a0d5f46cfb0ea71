"""Checkpoints: written beside their final name, renamed when whole, verified before use, pruned to the newest and best.

checkpoints/step-00000500/   state/             weights, Adam's moments and averages, of every rank (see state.py)
                             rng-rank0.pt, …    torch's random state
                             loss.pt            statistics that normalise the teacher's features
                             model.safetensors  averaged weights, fp32, with config.yaml: loads without DeepSpeed
                             run.json           step, samples consumed, world, ZeRO stage, digests
                             manifest.json      size and BLAKE2b of every file above
checkpoints/latest, best     the name of a folder
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from math import inf
from pathlib import Path

import torch

from data.files import sync, write_atomically
from train.checkpoint.manifest import (
    STEP,
    CheckpointError,
    RunState,
    damage,
    entries_of,
    read_state,
    read_tensors,
    seal,
)
from train.checkpoint.model import write_model
from train.checkpoint.state import read_state_into, state_layout, write_state
from train.config.schema import Config
from train.engine.average import Ema
from train.engine.engine import Engine


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.held: Callable[[], set[Path]] = set  # what somebody still reads: it is pruned later

    def steps(self) -> list[int]:
        """Steps with a finished folder, ascending; unfinished ones (`.tmp`) do not count."""
        if not self.folder.is_dir():
            return []
        found = (STEP.match(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def newest_whole(
        self, check: Callable[[Path], str | None] = damage, steps: Sequence[int] | None = None
    ) -> tuple[Path | None, list[str]]:
        """The newest checkpoint (of `steps`, None: of all) whose every byte is there, and a line about each newer one
        that is damaged."""
        damaged = []
        for step in reversed(self.steps() if steps is None else steps):
            problem = check(self.path(step))
            if problem is None:
                return self.path(step), damaged
            damaged.append(problem)
        return None, damaged

    def adopt(self, whole: Path) -> Path:
        """Give a whole folder `step-N.tmp` its name, in place of an older one of that step. Killed in between, `tidy`
        does the rest."""
        final, old = whole.with_suffix(""), whole.with_suffix(".old")
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
        os.rename(whole, final)
        sync(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        return final

    def tidy(self) -> None:
        """Finish or remove what a killed run left half done. Only the process that holds the run's lock may."""
        if not self.folder.is_dir():
            return
        for suffix in (".tmp", ".old"):
            for entry in sorted(self.folder.glob(f"step-*{suffix}")):
                if not entry.with_suffix("").exists() and damage(entry) is None:
                    self.adopt(entry)
        for suffix in (".tmp", ".old", ".pruned"):
            for entry in self.folder.glob(f"step-*{suffix}"):
                shutil.rmtree(entry, ignore_errors=True)
        self._point()

    def set_aside_newer(self, step: int) -> None:
        """Take checkpoints after `step` out of the count: the run goes on from there and will write those steps again,
        and pruning must not keep them in place of sound ones. They stay on the disk as `….replaced`."""
        for newer in self.steps():
            if newer > step:
                aside = self.path(newer).with_suffix(".replaced")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(self.path(newer), aside)
        self._point()

    def best(self) -> Path | None:
        """The checkpoint with the largest gain on the severe tiers, if one was evaluated and is still there."""
        path = self._pointed("best")
        return path if path is not None and path.is_dir() else None

    def save(self, engine: Engine, ema: Ema, state: RunState, config: Config, loss_state: dict) -> Path:
        """Write a checkpoint; every rank calls this. The folder gets its name when all of it is on the disk."""
        final = self.path(state.step)
        unfinished = final.with_name(final.name + ".tmp")
        with engine.agreed():
            if engine.main:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
        own: dict[str, dict] = {}
        with engine.agreed(), _writing(unfinished):
            random = unfinished / f"rng-rank{engine.rank}.pt"
            torch.save(_random_state(), random)
            own = entries_of(unfinished, [write_state(unfinished, engine, ema), random])
        known = {name: entry for each in engine.gather(own) for name, entry in each.items()}
        with _writing(unfinished):
            write_model(unfinished, engine, ema, config)
        with engine.agreed(), _writing(unfinished):
            if engine.main:
                torch.save(loss_state, unfinished / "loss.pt")
                write_atomically(unfinished / "run.json", json.dumps(asdict(state), indent=1) + "\n")
                seal(unfinished, known)
                self.adopt(unfinished)  # in place of one of the same step, after a resume from an older one
                self._point()
                self.prune(state.step)
        return final

    def restore(self, path: Path, engine: Engine, ema: Ema) -> dict:
        """Load a verified checkpoint into a wrapped engine and its average, whatever ranks and ZeRO stage wrote it;
        returns the loss's state.

        torch's random state comes back where the number of ranks is the same; on another number every rank starts one
        that depends on (seed, step, rank).
        """
        with engine.agreed():
            layout = state_layout(path) if engine.main else None
        layout = engine.gather(layout)[0]  # else every rank opened every rank's file to find its own
        with engine.agreed():
            read_state_into(path, engine, ema, layout)
            state = read_state(path)
            if state.world == engine.world:
                _restore_random_state(read_tensors(path / f"rng-rank{engine.rank}.pt"))
            else:
                facts = f"{state.seed}/{state.step}/{engine.rank}".encode()
                torch.manual_seed(int.from_bytes(hashlib.blake2b(facts, digest_size=7).digest(), "little"))
            return read_tensors(path / "loss.pt", engine.device)

    def forget_replaced(self) -> None:
        """Remove what `set_aside_newer` kept: the run has come to its end without it."""
        for entry in self.folder.glob("step-*.replaced"):
            shutil.rmtree(entry, ignore_errors=True)

    def _point(self) -> None:
        """Write `latest` and `best` as the folders say, whatever a killed process left; of equal gains the first."""
        steps = self.steps()
        gains = {step: self._gain_of(self.path(step)) for step in steps}
        best = max(steps, key=lambda step: (gains[step], -step), default=None)
        named = {"latest": steps[-1] if steps else None, "best": None if best is None or gains[best] == -inf else best}
        for name, step in named.items():
            if step is None:
                (self.folder / name).unlink(missing_ok=True)
            elif self._pointed(name) != self.path(step):
                write_atomically(self.folder / name, self.path(step).name + "\n")

    def _pointed(self, name: str) -> Path | None:
        pointer = self.folder / name
        text = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
        return self.folder / text if STEP.match(text) else None  # else damaged: `_point` writes it anew

    def prune(self, current: int) -> None:
        """Remove all but the newest `keep`, the best, the current step's, and what is held."""
        spared = {self.best(), self.path(current)} | self.held()
        for step in self.steps()[: -self.keep]:
            path = self.path(step)
            if path not in spared:
                going = path.with_suffix(".pruned")  # killed while removing: not a torn checkpoint
                os.rename(path, going)
                shutil.rmtree(going, ignore_errors=True)  # a file that somebody reads may stay: `tidy` removes it

    def _gain_of(self, path: Path) -> float:
        try:
            gain = read_state(path).gain
        except CheckpointError:  # damaged: anything is better
            return -inf
        return -inf if gain is None else gain


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A failure to write (a full disk, which torch calls a RuntimeError) as one line; the older ones are untouched."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(
            f"{folder}: the checkpoint cannot be written ({reason}): free space there; the older checkpoints are whole"
        ) from error


def _random_state() -> dict:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
