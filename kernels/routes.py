"""Which way an operation is computed: cases, the ways, and what `impl="auto"` takes in this process.

A *case* is one call as a run makes it. A *route* is one way to compute it. A *group* is what launch configurations are
chosen by (operation, channels, prior channels or groups, dtype): all cases of a group take one route, so the choice
costs one look into a small table, and no size enters a compiled graph. `kernels.check` makes that table.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.attention import configs

# triton: the checked-in launch table. triton-tiled: the same with neither of the two fused kernels, whatever the width.
# composed: plain differentiable PyTorch. compiled: torch.compile of it.
ROUTES = ("triton", "triton-tiled", "composed", "compiled")
DEFAULT = "triton"

Group = tuple[str, int, int, torch.dtype]
Layout = Literal["NCHW", "channels_last"]
_DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
_log = logging.getLogger("sharpprior")


@dataclass(frozen=True)
class AttentionCase:
    """One call of semantic attention: x [batch, channels, height, width], p [batch, prior, height, width]."""

    batch: int
    channels: int
    height: int
    width: int
    prior: int
    heads: int
    dtype: str
    layout: Layout = "NCHW"

    operation = "attention"

    @property
    def group(self) -> Group:
        """What its launches are chosen by."""
        return ("attention", self.channels, self.prior, _DTYPES[self.dtype])

    def __str__(self) -> str:
        shape = f"{self.batch}×{self.channels}×{self.height}×{self.width}"
        return f"attention {shape}, D {self.prior}, heads {self.heads}, {self.dtype}, {self.layout}"


@dataclass(frozen=True)
class AggregationCase:
    """One call of level aggregation: levels [batch, channels | groups, h_l, w_l] → [batch, channels, height, width]."""

    batch: int
    channels: int
    height: int
    width: int
    groups: int
    levels: tuple[tuple[int, int], ...]
    dtype: str
    layout: Layout = "NCHW"

    operation = "aggregation"

    @property
    def group(self) -> Group:
        """What its launches are chosen by."""
        return ("aggregation", self.channels, self.groups, _DTYPES[self.dtype])

    def __str__(self) -> str:
        levels = " ".join(f"{h}×{w}" for h, w in self.levels)
        shape = f"{self.batch}×{self.channels}×{self.height}×{self.width}"
        return f"aggregation {shape} of levels {levels}, {self.groups} groups, {self.dtype}, {self.layout}"


Case = AttentionCase | AggregationCase
_KINDS = {"attention": AttentionCase, "aggregation": AggregationCase}


def case_to_json(case: Case) -> dict[str, Any]:
    """Plain values, for a file or a pipe."""
    return {"operation": case.operation} | asdict(case)


def case_from_json(given: object) -> Case:
    """The case of `case_to_json`; ValueError naming what is wrong with anything else."""
    if not isinstance(given, dict) or given.get("operation") not in _KINDS:
        raise ValueError(f'case: expected an object with "operation" attention or aggregation, got {given!r}')
    kind = _KINDS[given["operation"]]
    values = {name: value for name, value in given.items() if name != "operation"}
    known = {field.name for field in fields(kind)}
    if (wrong := sorted(values.keys() - known)) or (wrong := sorted(known - values.keys() - {"layout"})):
        raise ValueError(f"{kind.operation} case: {', '.join(wrong)}: unknown or missing; it has {sorted(known)}")
    try:
        if "levels" in values:
            values["levels"] = tuple((int(h), int(w)) for h, w in values["levels"])
        case = kind(**values)
        counts = [v for v in values.values() if isinstance(v, int)] + [n for s in values.get("levels", ()) for n in s]
        whole = all(type(getattr(case, f.name)) is int for f in fields(kind) if f.type == "int")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{kind.operation} case: {error}") from None
    parts = case.heads if kind is AttentionCase else case.groups
    if not whole or min(counts) < 1 or not values.get("levels", True) or case.channels % parts:
        raise ValueError(f"{kind.operation} case: sizes are positive whole numbers, heads and groups divide channels")
    if case.dtype not in _DTYPES or case.layout not in ("NCHW", "channels_last"):
        raise ValueError(
            f"{kind.operation} case: dtype is one of {', '.join(_DTYPES)}, layout NCHW or channels_last; got "
            f"{case.dtype}, {case.layout}"
        )
    return case


# -- the choice in this process ---------------------------------------------------------------------------------------

_chosen: dict[Group, str] = {}
_composed: list[None] = []  # one entry a block of `composed` that is open
_judged: dict[Group, set[bool]] = {}
_told: set[tuple] = set()
_recorded: list[dict[Case, None]] = []


def use(choices: Mapping[Case, str]) -> None:
    """From now on `impl="auto"` takes these routes, on whatever device; cases of one group have one route.

    Replaces what was chosen before; an empty mapping gives the defaults back.
    """
    _chosen.clear()
    _judged.clear()
    _told.clear()
    configs.TILED_GROUPS.clear()
    for case, route in choices.items():
        if route not in ROUTES:
            raise ValueError(f"route {route!r} is unknown; use one of {', '.join(ROUTES)}")
        assert _chosen.setdefault(case.group, route) == route, f"two routes for {case.group}"
        _judged.setdefault(case.group, set()).add(case.layout == "channels_last")
        if route == "triton-tiled":
            configs.TILED_GROUPS.add(case.group[1:])


def chosen(group: Group, first: Tensor) -> tuple[str | None, Tensor]:
    """The route that `use` gave the group of a call whose first map is `first`, and that map in a layout that was
    judged. (None, first) where nothing was chosen at all.

    In a process that judges, nothing unjudged runs on the kernels: a group that is not known takes the composed form,
    an unjudged layout is turned into the judged one. Either is told once.
    """
    if _composed:
        return "composed", first
    if not _chosen:
        return None, first
    route = _chosen.get(group)
    if route is None:
        _tell_once(group, "composed runs")
        return "composed", first
    if not route.startswith("triton") or _last(first) in _judged[group]:
        return route, first
    wanted = torch.contiguous_format if _last(first) else torch.channels_last
    _tell_once((*group, layout_of(first)), "it is copied to the other layout")
    return route, first.contiguous(memory_format=wanted)


def _tell_once(key: tuple, instead: str) -> None:
    if not torch.compiler.is_compiling() and key not in _told:
        _told.add(key)
        _log.warning("kernels: %s was not checked before this run: %s", " ".join(map(str, key)), instead)


@contextlib.contextmanager
def composed() -> Iterator[None]:
    """In the block `impl="auto"` takes the composed form everywhere: operators that every program knows, for export."""
    _composed.append(None)
    try:
        yield
    finally:
        _composed.pop()


@contextlib.contextmanager
def record() -> Iterator[dict[Case, None]]:
    """Collect, as the keys of a dictionary in their order, the cases of all calls in the block, whatever their device
    (fake tensors too). Calls inside a compiled graph, and in float64, are not seen."""
    found: dict[Case, None] = {}
    _recorded.append(found)
    try:
        yield found
    finally:
        _recorded.remove(found)


def note_attention(x: Tensor, p: Tensor, heads: int) -> None:
    """Tell those who record about a call."""
    if _recorded and not torch.compiler.is_compiling() and (dtype := str(x.dtype)[6:]) in _DTYPES:
        B, C, H, W = x.shape
        _note(AttentionCase(B, C, H, W, p.shape[1], heads, dtype, layout_of(x)))


def note_aggregation(values: Sequence[Tensor], groups: int, size: tuple[int, int]) -> None:
    """Tell those who record about a call."""
    if _recorded and not torch.compiler.is_compiling() and (dtype := str(values[0].dtype)[6:]) in _DTYPES:
        B, D = values[0].shape[:2]
        levels = tuple((v.shape[2], v.shape[3]) for v in values)
        _note(AggregationCase(B, D, *size, groups, levels, dtype, layout_of(values[0])))


def _note(case: Case) -> None:
    for found in _recorded:
        found[case] = None


def layout_of(tensor: Tensor) -> Layout:
    """The layout that the kernels see."""
    return "channels_last" if _last(tensor) else "NCHW"


def _last(tensor: Tensor) -> bool:
    return tensor.shape[1] > 1 and tensor.stride(1) == 1 and not tensor.is_contiguous()
