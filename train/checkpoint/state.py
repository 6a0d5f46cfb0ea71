"""The state of training in a form that any number of ranks and any ZeRO stage takes up: fp32, cut per parameter.

state/rank-00000.safetensors, …   one file a rank: `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, `average/NAME`,
                                  each a flat piece; where it starts in the flat parameter, and the parameter's updates,
                                  stand in the file's metadata
state/engine.json                 counters and loss scale

Every rank writes the pieces that it owns and nothing twice; a rank of another run reads the pieces that cover what it
owns there. DeepSpeed's own universal checkpoint (0.19.8) is not used: under ZeRO 3 it gives every parameter group the
first one's weight decay, it has no ZeRO 0, and it needs a conversion in between (docs/LOG.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from model.pretrained import WEIGHTS, SafetensorsWriter
from train.engine.average import Ema
from train.engine.counters import engine_facts, take_engine_facts
from train.engine.engine import Engine
from train.engine.pieces import MOMENTS, Piece, fresh_optimizer_state, pieces
from train.engine.zero import forget_gathered, local_part, local_span, put, whole_shape

STATE = "state"


# -- writing ----------------------------------------------------------------------------------------------------------
def write_state(folder: Path, engine: Engine, ema: Ema) -> Path:
    """Write this rank's file, one piece after the other, and return it: no second copy of anything is held. No
    collectives."""
    stage = engine.config.engine.zero
    entries: list[tuple[str, int, int, Callable[[], Tensor]]] = []
    updates: dict[str, int] = {}
    for number, piece in enumerate(pieces(engine)):
        if stage == 0 and number % engine.world != engine.rank:  # every rank has all of it: they share the writing
            continue
        updates[piece.name] = piece.updates
        for key in ("weight", *MOMENTS):
            entries.append((f"{key}/{piece.name}", piece.start, piece.count, partial(piece.read, key)))
    for number, (name, start, count) in enumerate(ema.parts()):
        if stage > 0 or number % engine.world == engine.rank:
            entries.append((f"average/{name}", start, count, partial(ema.read, name)))
    (folder / STATE).mkdir(exist_ok=True)
    metadata = {
        "starts": json.dumps({key: start for key, start, *_ in entries}),
        "updates": json.dumps(updates),
        "averaged": str(ema.updates),
    }
    layout = [(key, (count,), torch.float32) for key, _, count, _ in entries]
    path = folder / STATE / f"rank-{engine.rank:05d}.safetensors"
    with SafetensorsWriter(path, layout, metadata) as file:
        for *_, read in entries:
            file.write(read())
    if engine.main:
        (folder / STATE / "engine.json").write_text(json.dumps(engine_facts(engine), indent=1) + "\n")
    return path


# -- reading ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Layout:
    """What the files of a checkpoint's state hold: {key: [(start, count, file's name)]}, Adam's updates by parameter,
    and the average's."""

    pieces: dict[str, list[tuple[int, int, str]]]
    updates: dict[str, int]
    averaged: int


def state_layout(folder: Path) -> Layout:
    """Read the headers of all files of a checkpoint's state. ValueError where there are none."""
    files = sorted((folder / STATE).glob("rank-*.safetensors"))
    if not files:
        raise ValueError(f"{folder / STATE}: no state of a training run there: name a checkpoint, or --init it")
    layout, averaged = Layout({}, {}, 0), 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
            layout.updates.update(json.loads(facts["updates"]))
            averaged = int(facts["averaged"])
            for key, start in json.loads(facts["starts"]).items():
                (count,) = file.get_slice(key).get_shape()
                layout.pieces.setdefault(key, []).append((start, count, path.name))
    return replace(layout, averaged=averaged)


class StateFiles:
    """The pieces of a checkpoint's state, whichever ranks wrote them. Opens and reads only what is asked for."""

    def __init__(self, folder: Path, layout: Layout | None = None) -> None:
        self.folder = folder / STATE
        layout = layout or state_layout(folder)
        self._pieces, self.updates, self.averaged = layout.pieces, layout.updates, layout.averaged
        self._opened: dict[str, Any] = {}

    def _file(self, name: str) -> Any:
        if name not in self._opened:
            self._opened[name] = safe_open(self.folder / name, framework="pt")
        return self._opened[name]

    def names(self) -> set[str]:
        """Names of the trained parameters."""
        return {key.removeprefix("weight/") for key in self._pieces if key.startswith("weight/")}

    def numel(self, key: str) -> int:
        """Elements of the whole tensor."""
        return sum(count for _, count, _ in self._pieces.get(key, []))

    def read(self, key: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of the flat tensor, fp32 on the CPU. ValueError where some are missing."""
        values, filled = torch.empty(count), 0
        for begin, length, name in self._pieces.get(key, []):
            first, last = max(start, begin), min(start + count, begin + length)
            if first < last:
                values[first - start : last - start] = self._file(name).get_slice(key)[first - begin : last - begin]
                filled += last - first
        if filled != count:
            raise ValueError(f"{self.folder}: {key} has {filled} of the {count} elements asked for: not a whole state")
        return values


@torch.no_grad()
def read_state_into(folder: Path, engine: Engine, ema: Ema, layout: Layout | None = None) -> None:
    """Take up a checkpoint's state on every rank of a wrapped engine, one parameter at a time, bit for bit.

    The number of ranks and the ZeRO stage may differ from those that wrote it. layout: what one rank has read of the
    files for all. No collectives.
    """
    files = StateFiles(folder, layout)
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if files.numel(f"weight/{name}") != whole_shape(parameter).numel():
            raise ValueError(f"{folder}: holds the state of another model: {name} differs: start with --init {folder}")
    extra = sorted(files.names() - trained.keys())
    if extra:
        raise ValueError(f"{folder}: holds the state of another model: {extra[0]} is not trained here: use --init")
    forget_gathered(engine.module)
    _read_untrained(folder, engine.module)
    for name, parameter in trained.items():  # the weights that the forward pass uses, in their own precision
        put(local_part(parameter), 0, files.read(f"weight/{name}", *local_span(parameter)))
    fresh_optimizer_state(engine)
    owned = pieces(engine)
    _check_counts(folder, owned, files)
    for piece in owned:
        for key in ("weight", *MOMENTS):
            piece.write(key, files.read(f"{key}/{piece.name}", piece.start, piece.count))
        piece.set_updates(files.updates[piece.name])
    for name, start, count in ema.parts():
        ema.write(name, files.read(f"average/{name}", start, count))
    ema.updates = files.averaged
    take_engine_facts(engine, json.loads((folder / STATE / "engine.json").read_text()))


def _check_counts(folder: Path, owned: list[Piece], files: StateFiles) -> None:
    """Under ZeRO one count serves a whole group of parameters; ZeRO 0 has one for each, which may differ."""
    counts: dict[int, int] = {}
    for piece in owned:
        count = files.updates[piece.name]
        if counts.setdefault(id(piece.flat), count) != count:
            raise ValueError(
                f"{folder}: {piece.name} was updated {count} times, its group {counts[id(piece.flat)]} times: this "
                "state fits engine.zero 0 alone"
            )


def _read_untrained(folder: Path, module: nn.Module) -> None:
    """Frozen parameters and buffers: the averaged model has them as they are."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name, tensor in _untrained(module):
            start, count = local_span(tensor)
            put(local_part(tensor), 0, file.get_tensor(name).view(-1)[start : start + count])


def _untrained(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                yield name, buffer
