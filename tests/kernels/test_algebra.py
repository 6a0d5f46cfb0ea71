"""The fused algebra against its PyTorch form in fp64 (interpreter), and what one call launches (without a GPU)."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.attention.algebra import (
    Grams,
    Modulation,
    Weights,
    gram_size,
    modulation,
    modulation_backward,
    split_grams,
)
from kernels.cases import attention_case
from kernels.runtime import INTERPRETING, TRITON_INSTALLED

pytestmark = pytest.mark.skipif(not TRITON_INSTALLED, reason="triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs in the interpreter's lane")
PIXELS = 30
# B, C, D, heads: heads of 1 channel, of all channels, of no power of two; more samples than groups; wide route's sizes.
SHAPES = [(2, 7, 5, 7), (1, 60, 20, 4), (9, 12, 17, 1), (2, 48, 96, 3), (1, 130, 24, 2)]


def algebra_case(shape, dtype=torch.float64, floored=False):
    """x [B, C, N], p, weights, flat Grams of maps as attention_case has them, and gradients of gain and shift."""
    B, C, D, heads = shape
    x, p, weights = attention_case((B, C, 1, PIXELS), D, heads, dtype=torch.float64)
    if floored:  # a query row that only sees the mean of x̂, a null key row, a null and a tiny prior
        weights.norm_weight.fill_(1.0)
        weights.norm_bias.zero_()
        weights.query[0] = 1.0
        weights.key[1] = 0.0
        p[0] = 0.0
        p[-1] *= 1e-8
    x, p = x.flatten(2), p.flatten(2)
    z = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    grams = Grams(z @ z.mT, z @ p.mT, p @ p.mT, z.sum(2), p.sum(2))
    flat = torch.cat([moment.flatten(1) for moment in grams], 1)
    rng = torch.Generator().manual_seed(3)
    upstream = torch.randn(B, 2, C, D, generator=rng, dtype=torch.float64)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    cast = [t.to(acc) for t in (flat, upstream)]
    return x.to(dtype), p.to(dtype), Weights(*(w.to(acc) for w in weights)), *cast


def fused(x, p, weights, flat, upstream, square=False):
    """Coefficients of both directions times their units, the weights' gradients; then the raw coefficients."""
    from kernels.attention import algebra_launch as launch

    C, D = x.shape[1], p.shape[1]
    state = launch.new_state(x, D)
    state.fill_(float("nan"))
    if square:
        grams, R = split_grams(flat, C, D), C + D + 3
        matrix = torch.full((x.shape[0], R, R), float("nan"), dtype=flat.dtype)
        matrix[:, :C, :C], matrix[:, :C, C : C + D], matrix[:, C : C + D, C : C + D] = grams[:3]
        matrix[:, C + D, :C], matrix[:, C + D, C : C + D] = grams.z, grams.p
        moments = launch.square_moments(matrix, C, D)
    else:
        state[:, : gram_size(C, D)] = flat
        moments = launch.flat_moments(state, C, D)
    forward = launch.fused_modulation(x, p, moments, state, weights)
    assert torch.equal(state[:, : gram_size(C, D)], flat)
    backward, d_weights = launch.fused_modulation_backward(x, p, state, weights, upstream)
    matrices = [forward.gain, forward.shift, backward.gain, backward.shift, backward.cross, backward.hzz, backward.hpp]
    if x.dtype == torch.float16:
        units = [*forward.units, *backward.units]
        matrices = [m.double() * unit.double()[:, None, None] for m, unit in zip(matrices, units, strict=True)]
    return [*matrices, backward.dzs, backward.dps, *d_weights], (forward, backward)


def oracle(x, p, weights, flat, upstream):
    flat, upstream, weights = flat.double(), upstream.double(), Weights(*(w.double() for w in weights))
    grams = split_grams(flat, x.shape[1], p.shape[1])
    gain, shift = modulation(grams, weights, PIXELS)
    _, d, d_weights = modulation_backward(grams, weights, PIXELS, Modulation(*upstream.unbind(1)))
    return [gain, shift, gain, shift, d.zp, 2 * d.zz, 2 * d.pp, d.z, d.p, *d_weights]


@interpreted
@pytest.mark.parametrize("square", [False, True], ids=["flat", "square"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_algebra_equals_its_pytorch_form_in_fp64(shape, square, poisoned):
    inputs = algebra_case(shape)
    for index, (a, b) in enumerate(zip(fused(*inputs, square=square)[0], oracle(*inputs), strict=True)):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max().clamp_min(1e-3), f"result {index}"


@interpreted
def test_floored_rows_equal_the_pytorch_form(poisoned):
    inputs = algebra_case((3, 12, 6, 2), floored=True)
    results, (_, _) = fused(*inputs)
    for index, (a, b) in enumerate(zip(results, oracle(*inputs), strict=True)):
        assert a.isfinite().all()
        assert (a - b).abs().max() <= 1e-9 * b.abs().max().clamp_min(1.0), f"result {index}"


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_error_stays_near_that_of_the_pytorch_form(dtype):
    x, p, weights, flat, upstream = algebra_case((2, 48, 24, 3), dtype)
    grams = split_grams(flat, 48, 24)
    gain, shift = modulation(grams, weights, PIXELS)
    _, d, d_weights = modulation_backward(grams, weights, PIXELS, Modulation(*upstream.unbind(1)))
    eager = [gain, shift, gain, shift, d.zp, 2 * d.zz, 2 * d.pp, d.z, d.p, *d_weights]
    results, _ = fused(x, p, weights, flat, upstream)
    exact = oracle(x, p, weights, flat, upstream)
    for index, (a, b, truth) in enumerate(zip(results, eager, exact, strict=True)):
        eps = torch.finfo(dtype if index < 7 else torch.float32).eps
        bound = 3 * ((b - truth).abs().max() + eps * truth.abs().max())
        assert (a - truth).abs().max() <= bound, f"result {index}"


@interpreted
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
def test_fp16_units_keep_every_coefficient_in_range(size):
    """The units come from bounds, not from the matrices: an entry must neither overflow nor sink among subnormals."""
    x, p, weights, flat, upstream = algebra_case((2, 48, 24, 3), torch.float16)
    _, (forward, backward) = fused(x, p, weights, flat, upstream * size)
    for matrix in (forward.gain, forward.shift, backward.cross, backward.hzz, backward.hpp):
        largest = matrix.float().abs().amax((1, 2))
        assert (largest < 2**15).all()
        assert (largest >= 1).all()


@interpreted
def test_fused_algebra_repeats_bitwise():
    inputs = algebra_case((2, 24, 12, 2), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(fused(*inputs)[0], fused(*inputs)[0], strict=True))


@interpreted
def test_fakes_know_what_the_kernels_return():
    x, p, weights = attention_case((2, 8, 5, 3), 6, 2)
    forward = (x, p, *weights, 1e-6, True)
    _, mean, rstd, state = torch.ops.sharpprior.semantic_attention(*forward)
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(torch.ops.sharpprior.semantic_attention.default, forward, **checks)
    backward = (x, x, p, *weights, mean, rstd, state, True)
    torch.library.opcheck(torch.ops.sharpprior.semantic_attention_backward.default, backward, **checks)


class Work(TorchDispatchMode):
    """PyTorch operators that would run something on a GPU: no views, no allocations."""

    NOTHING = ("empty", "view", "as_strided", "transpose", "permute", "select", "slice", "detach", "alias", "unbind")

    def __init__(self, seen: list):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not name.startswith(self.NOTHING):
            self.seen.append((name, sum(a.nbytes for a in args if isinstance(a, torch.Tensor))))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """A function that lists (name, bytes of its tensors) of what a forward and a backward launch on sm_90."""
    from triton.runtime.jit import JITFunction

    from kernels.attention import configs, triton_forward
    from tests.kernels.aot import Attention

    seen: list[tuple[str, int]] = []

    def record(self, *args, grid, warmup, **kwargs):
        tensors = {id(a): a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)}
        seen.append((self.fn.__name__, sum(t.nbytes for t in tensors.values())))

    def run(C: int, size: int, dtype=torch.bfloat16, channels_last=True, batch=8, D=64) -> list[tuple[str, int]]:
        seen.clear()
        with Work(seen):
            Attention(C, D, dtype, channels_last, batch, size * size).launch()
        return list(seen)

    for module in (configs, triton_forward):
        monkeypatch.setattr(module, "target_architecture", lambda: 90)
    monkeypatch.setattr(JITFunction, "run", record)
    return run


@pytest.mark.skipif(INTERPRETING, reason="the interpreter does not go through the launcher")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (256, 32)], ids=["8x64x128x128", "8x256x32x32"])
def test_forward_and_backward_launch_few_kernels(launches, shape, dtype):
    """301 launches before, 290 of them the algebra's; the algebra takes 3 forward and 4 backward at any shape."""
    names = [name for name, _ in launches(*shape, dtype)]
    algebra = ("project_kernel", "attend_kernel", "fold_kernel")
    assert [name for name in names if name in algebra] == [*algebra]
    back = ("output_gradient_kernel", "attend_gradient_kernel", "input_gradient_kernel", "weight_gradient_kernel")
    assert [name for name in names if name in back] == [*back]
    assert len(names) <= (13 if "gram_kernel" in names and "gradient_kernel" in names else 15), names
    assert {name for name in names if not name.endswith("_kernel")} <= {"bmm"}, names
