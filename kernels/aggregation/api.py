"""The public function of multi-level aggregation: checks, dtype rule, choice of implementation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import compiled, routes
from kernels.aggregation.ops import AggregateLevels
from kernels.aggregation.reference import composed_aggregation
from kernels.runtime import check_maps, choose, memory_format, plane_like


def aggregate_levels(
    values: Sequence[Tensor], logits: Sequence[Tensor], size: tuple[int, int], *, impl: str = "auto"
) -> Tensor:
    """Multi-level aggregation: P(n) = Σ_l softmax_l(ã_l(n)) Ṽ_l(n), tilde: bilinear sample at pixel n of the target.

    values: L levels [B, D, h_l, w_l]; logits: L levels [B, G, h_l, w_l], G divides D, channel c belongs to group
    c // (D/G); size (H, W) of the target in pixels → P [B, D, H, W]. Levels may be smaller or larger than the target;
    samples are those of F.interpolate(mode="bilinear", align_corners=False).

    dtype: all levels are cast to the dtype of values[0], which is P's, also under autocast; sampling, softmax and sums
    run in float32 (float64 where the values are). impl: "auto" takes what `kernels.routes` has for these
    channels and dtype (see kernels.check); without, the Triton kernels on a GPU (float32, float16, bfloat16; the
    composed form beyond), and the chunked PyTorch reference on a CPU. "triton", "reference", "composed" and "compiled"
    (plain PyTorch with all in memory, as it is or through torch.compile) never fall back. Differentiable once, bitwise
    repeatable with the kernels and on CPU. Raises ValueError naming the argument.

    Source: METHOD of this project after Wang et al., arXiv 2302.06898 (their code is not public: the form is ours).
    """
    values, logits = list(values), list(logits)
    if not values:
        raise ValueError("values: holds no level; give at least one")
    if len(values) != len(logits):
        raise ValueError(f"logits: {len(logits)} levels for the {len(values)} levels of values")
    named = {f"values[{i}]": v for i, v in enumerate(values)} | {f"logits[{i}]": a for i, a in enumerate(logits)}
    check_maps(named)
    D, G = values[0].shape[1], logits[0].shape[1]
    if D % G:
        raise ValueError(f"logits: {G} groups do not divide the {D} channels of values")
    for i, (value, logit) in enumerate(zip(values, logits, strict=True)):
        if value.shape[1] != D:
            raise ValueError(f"values[{i}]: {value.shape[1]} channels differ from values[0]'s {D}")
        if logit.shape[1] != G:
            raise ValueError(f"logits[{i}]: {logit.shape[1]} groups differ from logits[0]'s {G}")
        if logit.shape[2:] != value.shape[2:]:
            raise ValueError(
                f"logits[{i}]: size {list(logit.shape[2:])} differs from values[{i}]'s {list(value.shape[2:])}"
            )
    if not isinstance(size, Sequence) or len(size) != 2 or not all(isinstance(n, (int, torch.SymInt)) for n in size):
        raise ValueError("size: expected two whole numbers (height, width)")
    if size[0] < 1 or size[1] < 1:
        raise ValueError(f"size: expected (height, width), both positive, got {size!r}")
    dtype = values[0].dtype
    chosen, values[0] = routes.chosen(("aggregation", D, G, dtype), values[0]) if impl == "auto" else (None, values[0])
    route = choose(impl, values[0], chosen=chosen)
    routes.note_aggregation(values, G, tuple(size))
    # The operators are opaque to autocast: every dtype is settled here, whatever region the caller is in.
    with torch.autocast(values[0].device.type, enabled=False):
        levels = [level.to(dtype) for level in (*values, *logits)]
        if route in ("composed", "compiled"):
            call = (composed_aggregation, levels[: len(values)], levels[len(values) :], tuple(size))
            out = compiled.run(*call) if route == "compiled" else call[0](*call[1:])
            return out.contiguous(memory_format=memory_format(values[0]))
        planes = [plane_like(level, values[0]) for level in levels]
        return AggregateLevels.apply(size[0], size[1], route == "triton", *planes)
