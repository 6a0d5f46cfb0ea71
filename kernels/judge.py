"""One case on one route, in this process: right or wrong, repeatable, how fast. `kernels.check` runs this elsewhere.

The rule: an error against fp64, largest and root mean square, may be twice that of the composed form in the same dtype
plus twice the dtype's epsilon of the result's own size (parameters: `_own_errors`); both Triton routes must repeat bit
for bit, write every element of their results and none beside them, and leave their inputs alone.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.aggregation.reference import composed_aggregation
from kernels.attention.algebra import Weights
from kernels.attention.reference import composed_attention
from kernels.cases import aggregation_case, attention_case, call_aggregation, call_attention
from kernels.fences import between_nans, fenced
from kernels.routes import AttentionCase, Case, use
from kernels.runtime import INTERPRETING

# The composed form's own largest error differs by half with the vector units of the CPU that sums: tests/kernels.
FACTOR = 3.0 if INTERPRETING else 2.0
TIMED_CALLS = 15
# In epsilons: how far a parameter's gradient may borrow the relative error of another one, and an error that the method
# itself makes where it is badly conditioned. ZERO: of the largest gradient, in float32, which they are summed in.
SHARED, METHOD, ZERO = 32.0, 64.0, 4.0 * torch.finfo(torch.float32).eps
_LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


Pair = tuple[float, float]
"""Largest and root mean square of a result or of its error."""


@dataclass(frozen=True)
class _Task:
    """A case with its inputs. maps: how many of the inputs, from the first on, have a batch."""

    inputs: list[Tensor]
    upstream: Tensor
    maps: int
    names: list[str]
    call: Callable[[Sequence[Tensor]], Tensor]
    composed: Callable[[Sequence[Tensor]], Tensor]
    gram: Callable[[Sequence[Tensor]], Tensor] | None = None  # the kernels' own method in plain PyTorch


def judge(case: Case, route: str, device: torch.device, *, timed: bool = False) -> dict[str, Any]:
    """What `case` gives on `route`: right (bool), why (text where wrong), error (largest, in bounds), repeats (bool),
    and with `timed`, on a GPU, ms (median of forward and backward with the gaps between launches), gpu_ms (the same of
    a CUDA graph, which has none; left out where it cannot be captured) and mib (peak beside the inputs).

    fatal: this process's GPU context is of no more use. passing: it says nothing about the next try (out of memory).
    """
    use({case: route})
    try:
        return _judged(_task(case, device), route, timed=timed and device.type == "cuda")
    except torch.OutOfMemoryError:
        return {"right": False, "why": "out of memory", "passing": True}
    except Exception as error:  # whatever a kernel, a compiler or a driver may raise
        text = str(error).strip().partition("\n")[0]
        if "illegal memory access" in text:
            return {"right": False, "why": "illegal memory access", "fatal": True}
        fatal = any(sign in text for sign in ("CUDA error", "HIP error", "Triton Error ["))
        found = {"right": False, "why": f"cannot run: {type(error).__name__}: {text}"[:300], "fatal": fatal}
        # A compiler may be installed tomorrow, and one that was killed leaves broken files behind.
        return found | ({"passing": True} if route == "compiled" and not fatal else {})
    finally:
        use({})


def _task(case: Case, device: torch.device) -> _Task:
    options = {"dtype": case.group[3], "device": device, "channels_last": case.layout == "channels_last"}
    drawn_on = "cpu" if device.type == "cpu" else device
    size, gram = (case.height, case.width), None
    if isinstance(case, AttentionCase):
        shape = (case.batch, case.channels, *size)
        x, p, weights = attention_case(shape, case.prior, case.heads, **options, drawn_on=drawn_on)
        inputs = [x, p, *weights]
        maps, names = 2, ["y", "dx", "dp", *(f"d_{name}" for name in Weights._fields)]

        def call(t: Sequence[Tensor]) -> Tensor:
            return call_attention(t[0], t[1], Weights(*t[2:]))

        def composed(t: Sequence[Tensor]) -> Tensor:
            return composed_attention(t[0], t[1], Weights(*t[2:]))

        def gram(t: Sequence[Tensor]) -> Tensor:
            return call_attention(t[0], t[1], Weights(*t[2:]), impl="reference")
    else:
        values, logits = aggregation_case(
            case.batch, case.channels, case.groups, case.levels, **options, drawn_on=drawn_on
        )
        inputs, count = [*values, *logits], len(values)
        maps = len(inputs)
        names = ["P", *(f"d_values[{i}]" for i in range(count)), *(f"d_logits[{i}]" for i in range(count))]

        def call(t: Sequence[Tensor]) -> Tensor:
            return call_aggregation(t[:count], t[count:], size)

        def composed(t: Sequence[Tensor]) -> Tensor:
            return composed_aggregation(t[:count], t[count:], size)

    rng = torch.Generator(drawn_on).manual_seed(7)
    upstream = torch.randn(case.batch, case.channels, *size, generator=rng, device=drawn_on).to(device, case.group[3])
    return _Task(inputs, upstream.contiguous(memory_format=_LAYOUTS[case.layout]), maps, names, call, composed, gram)


def _results(function: Callable, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output and the gradients of all inputs, finished on the device."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(leaves)
    results = [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
    if upstream.is_cuda:
        torch.cuda.synchronize(upstream.device)
    return results


def _by_sample(task: _Task, function: Callable, dtype: torch.dtype | None) -> list[Tensor]:
    """Results of a form, one sample after the other, in `dtype` (None: the inputs' own): the oracle of a large batch
    must fit beside a network."""
    parts: list[list[Tensor]] = []
    for b in range(task.upstream.shape[0]):
        one = [t[b : b + 1] if i < task.maps else t for i, t in enumerate(task.inputs)]
        one = [t if dtype is None else t.to(dtype) for t in one]
        parts.append(_results(function, one, task.upstream[b : b + 1].to(one[0].dtype)))
    columns = list(zip(*parts, strict=True))
    maps, shared = columns[: task.maps + 1], columns[task.maps + 1 :]
    return [torch.cat(c) for c in maps] + [torch.stack(c).double().sum(0) for c in shared]


def _judged(task: _Task, route: str, *, timed: bool) -> dict[str, Any]:
    ours = route.startswith("triton")
    copies = [t.clone() for t in task.inputs]
    with fenced() if ours else contextlib.nullcontext() as fences:
        guarded = [between_nans(t) for t in task.inputs] if ours else task.inputs
        first = _results(task.call, guarded, task.upstream)
    if fences is not None and fences.broken():  # without fences it would write over something of this process
        return {"right": False, "why": "writes outside its results"}
    second = _results(task.call, task.inputs, task.upstream)
    wrong = []
    if not all(torch.equal(a, b) for a, b in zip((*guarded, *task.inputs), (*copies, *copies), strict=True)):
        wrong.append("writes into its inputs")
    repeats = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exact, eager = _by_sample(task, task.composed, torch.float64), _by_sample(task, task.composed, None)
    own = _own_errors(task, eager, exact)
    worst, text = _worst(task, (first, second), exact, own)
    if worst > 1 and task.gram is not None:
        own = _own_errors_of_method(task, own, exact)
        worst, text = _worst(task, (first, second), exact, own)
    if worst > 1:
        wrong.append(text)
    if ours and not repeats:
        wrong.append("not repeatable")
    result = {"right": not wrong, "why": "; ".join(wrong) or None, "error": round(worst, 4), "repeats": repeats}
    if timed and not wrong:
        del first, second, exact, eager, guarded, copies
        result |= _timings(task)
    return result


def _sizes(t: Tensor) -> Pair:
    """(largest, root mean square) of the elements."""
    return float(t.abs().max()), float(t.square().mean().sqrt())


def _own_errors(task: _Task, eager: list[Tensor], exact: list[Tensor]) -> list[Pair]:
    """Errors of the composed form in the case's dtype. Gradients of parameters share the worst relative one of them, up
    to SHARED epsilons: a vector of four numbers may be exact by luck. One that is nothing but rounding (below epsilon
    times the largest) has no relative error to share, and each may be off by ZERO times the largest."""
    eps = torch.finfo(task.inputs[0].dtype).eps
    errors = [list(_sizes(a.double() - truth)) for a, truth in zip(eager, exact, strict=True)]
    sizes, largest = [_sizes(truth) for truth in exact], _largest(task, exact)
    shared = range(task.maps + 1, len(errors))
    for kind in (0, 1):
        live = [i for i in shared if sizes[i][kind] > eps * largest[kind]]
        worst = max((errors[i][kind] / sizes[i][kind] for i in live), default=0.0)
        for i in shared:
            part = min(worst, SHARED * eps) * sizes[i][kind] if i in live else 0.0
            errors[i][kind] = max(errors[i][kind], part, ZERO * largest[kind])
    return [(one, two) for one, two in errors]


def _own_errors_of_method(task: _Task, own: list[Pair], exact: list[Tensor]) -> list[Pair]:
    """`own`, or what the kernels' method costs in plain PyTorch where that is more, up to METHOD epsilons of a map, or
    of the largest gradient of a parameter: it norms rows by Gram matrices, which cancel over one pixel."""
    assert task.gram is not None
    # Never as much as a wrong sign, in bfloat16 neither.
    limit, largest = min(METHOD * torch.finfo(task.inputs[0].dtype).eps, 0.1), _largest(task, exact)
    found = []
    for i, (mine, method, truth) in enumerate(zip(own, _by_sample(task, task.gram, None), exact, strict=True)):
        scale = largest if i > task.maps else _sizes(truth)
        errors = _sizes(method.double() - truth)
        pair = [max(m, min(e, limit * s)) for m, e, s in zip(mine, errors, scale, strict=True)]
        found.append((pair[0], pair[1]))
    return found


def _largest(task: _Task, exact: list[Tensor]) -> Pair:
    """The largest of the sizes of all parameters' gradients; 0 without parameters."""
    sizes = [_sizes(truth) for truth in exact[task.maps + 1 :]]
    return max((s[0] for s in sizes), default=0.0), max((s[1] for s in sizes), default=0.0)


def _worst(
    task: _Task, calls: Sequence[list[Tensor]], exact: list[Tensor], own: list[Pair]
) -> tuple[float, str | None]:
    """The largest error of all results of the calls, in bounds, and what to say of it."""
    eps, worst, text = torch.finfo(task.inputs[0].dtype).eps, 0.0, None
    for results in calls:
        for name, tested, truth, errors in zip(task.names, results, exact, own, strict=True):
            ratio, said = _error(name, tested.double(), truth, errors, eps)
            if ratio > worst:
                worst, text = ratio, said
    return worst, text


def _error(name: str, tested: Tensor, truth: Tensor, own: Pair, eps: float) -> tuple[float, str]:
    """(error in bounds, what to say of it) of one result; infinite where it is not finite."""
    if tested.shape != truth.shape:
        return float("inf"), f"{name} has shape {list(tested.shape)} instead of {list(truth.shape)}"
    if not bool(tested.isfinite().all()):
        return float("inf"), f"{name} is not finite"
    sizes, errors = _sizes(truth), _sizes(tested - truth)
    bounds = [FACTOR * (mine + eps * size) for mine, size in zip(own, sizes, strict=True)]
    ratios = [e / b if b > 0 else (0.0 if e == 0 else float("inf")) for e, b in zip(errors, bounds, strict=True)]
    relative, bound = (value / (sizes[1] or 1.0) for value in (errors[1], bounds[1]))
    text = f"wrong {name}: relative RMS error {relative:.2g} (bound {bound:.2g}), largest {ratios[0]:.2g} × its bound"
    return max(ratios), text


def _timings(task: _Task) -> dict[str, float]:
    """Median ms of forward and backward as an eager training step calls them and as a CUDA graph replays them, and peak
    MiB of the former beside the inputs."""
    leaves = [t.detach().requires_grad_() for t in task.inputs]

    def run() -> None:
        torch.autograd.grad(task.call(leaves), leaves, task.upstream)

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ms = _median_ms(run)
    peak = torch.cuda.max_memory_allocated() - base
    found = {"ms": ms, "mib": round(peak / 2**20, 1)}
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        found["gpu_ms"] = _median_ms(graph.replay)
    except RuntimeError:  # what it calls cannot be captured: then a training run replays it neither
        torch.cuda.synchronize()
    return found


def _median_ms(run: Callable[[], object]) -> float:
    times = []
    for _ in range(TIMED_CALLS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times), 4)
