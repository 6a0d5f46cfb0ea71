"""How much a step computes a second, and what part of the GPUs' peak that is."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from model.summary import FORMULAS
from train.config.patches import phase_at
from train.config.schema import Config
from train.run.schedule import stage

# Dense peaks, TFLOP/s: (bf16 and fp16 with fp32 sums, TF32), by a pattern of the name that torch gives, the first that
# fits. Source: NVIDIA's data sheet of each, and the Ada and GA102 white papers for GeForce; where a sheet counts
# sparsity in, half of it.
PEAKS = {
    "B200": (2250.0, 1100.0),
    "G?H200": (989.0, 494.0),
    "H100 PCIe": (756.0, 378.0),
    "H100 NVL": (835.0, 417.0),
    "H100": (989.0, 494.0),
    "A100": (312.0, 156.0),
    "L40S": (362.0, 183.0),
    "L4": (121.0, 60.0),
    "RTX 4090$": (165.0, 82.6),
    "RTX 3090$": (71.0, 35.6),
}


def _attention_backward_flops(dy_shape, x_shape, p_shape, *_) -> int:
    """Count what the derivative needs: dM and dp of [g; b] = M p, and the Gram matrices' gradients times x̂ and p."""
    B, C, H, W = x_shape
    D = p_shape[1]
    return 2 * B * H * W * (4 * C * D + C * C + 2 * C * D + D * D)


def _convolution_backward_flops(
    dy_shape, x_shape, weight_shape, _bias, _stride, _padding, _dilation, transposed, *rest
):
    """Count the forward pass once for each gradient that is asked for. torch's own formula takes a depthwise
    convolution for a full one."""
    places = math.prod(x_shape) if transposed else math.prod(dy_shape)
    *_, (wants_x, wants_weight, _) = rest
    return 2 * places * math.prod(weight_shape[1:]) * (wants_x + wants_weight)


OURS = {
    **FORMULAS,
    torch.ops.sharpprior.semantic_attention_backward: _attention_backward_flops,
    torch.ops.aten.convolution_backward: _convolution_backward_flops,
}


class Rates:
    """Pairs and floating-point operations a second of training steps, on rank 0.

    Products and convolutions are counted where a stage's first step runs them, forward and backward, by the operators
    that torch dispatches; they are those of this rank, and every rank has as many. Under `engine.checkpointing` what is
    computed twice counts twice; a teacher whose features are cached does not count. Nothing is counted where
    torch.compile runs a network: it does not compile what is watched. peak: FLOP/s of all ranks, None: not known.
    """

    def __init__(self, config: Config, world: int, peak: float | None, done: int) -> None:
        self._config, self._world, self._peak = config, world, peak
        self._cached = config.features.cache != "off"
        self._counts = not (
            config.engine.compile or (config.model.prior and any(t.compile for t in config.model.teacher))
        )
        self._flops: dict[tuple[str, int], int] = {}  # of a stage's steps in a phase of the crops
        self._now = 0
        self.next(done)

    def next(self, done: int) -> None:
        """The step after `done` ones begins."""
        phase = phase_at(self._config, done)
        self._kind, self._batch = (stage(done, self._config), phase.first), phase.batch
        self._watched = self._counts and self._kind not in self._flops
        self._now = 0

    @contextlib.contextmanager
    def counted(self, part: str) -> Iterator[None]:
        """Count the block, where it is a part of a step that is counted: `losses` or `backward`."""
        if not self._watched or part not in ("losses", "backward"):
            yield
            return
        with FlopCounter(frozen=not (self._cached and part == "losses")) as counter:
            yield
        self._now += counter.total

    def of(self, seconds: float) -> dict[str, float]:
        """Of the step just done: `pairs_per_s`; `tflops` a second over all ranks; `mfu`, their part of the peak."""
        if self._watched:
            self._flops[self._kind] = self._now
        found = {"pairs_per_s": self._batch / seconds}
        if self._kind in self._flops:
            flops = self._flops[self._kind] * self._world / seconds
            found["tflops"] = flops / 1e12
            if self._peak is not None:
                found["mfu"] = flops / self._peak
        return found


class FlopCounter(TorchDispatchMode):
    """Adds up, as `total`, the FLOPs of every operator that torch or we have a formula for; a multiplication and an
    addition are two. frozen: also of what runs without grad mode."""

    def __init__(self, *, frozen: bool = True) -> None:
        super().__init__()
        self.total, self._frozen = 0, frozen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operator = getattr(func, "_overloadpacket", None)
        if self._frozen or torch.is_grad_enabled():
            if operator in OURS:
                self.total += OURS[operator](*(x.shape if isinstance(x, torch.Tensor) else x for x in args), **kwargs)
            elif operator in flop_registry:
                self.total += flop_registry[operator](*args, **kwargs, out_val=result)
        return result


def peak_flops(device: torch.device, precision: str, world: int) -> float | None:
    """Dense peak of `world` GPUs like this one, FLOP/s, in a run's precision (fp32: TF32, which convolutions use); None
    where the GPU is not in the table, and on a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = next((peaks for pattern, peaks in PEAKS.items() if re.search(rf"\b{pattern}\b", name)), None)
    return None if found is None else found[precision == "fp32"] * 1e12 * world
