"""The public function of semantic attention: checks, dtype rule, choice of implementation."""

import torch
from torch import Tensor

from kernels import compiled, routes
from kernels.attention.algebra import Weights
from kernels.attention.ops import SemanticAttention
from kernels.attention.reference import composed_attention
from kernels.runtime import accumulator, as_plane, check_maps, check_parameters, choose, memory_format, plane_like

MAX_CHANNELS = 512


def semantic_attention(
    x: Tensor,
    p: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    temperature: Tensor,
    out_weight: Tensor,
    scale: Tensor,
    heads: int,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """Semantic attention transformation: y = x + scale ⊙ (x̂ ⊙ g + b), where [g; b] attends from x to the prior p.

    x [B, C, H, W], p [B, D, H, W] → y [B, C, H, W]. x̂ is x normalised over channels (norm_weight, norm_bias [C], eps);
    query_weight [C, C], key_weight and value_weight [C, D], temperature [heads], out_weight [2C, C], scale [C];
    heads divides C. scale = 0 returns x bit for bit.

    dtype: y is in x's dtype, also under autocast; p is cast to x's dtype; weights, Gram matrices, norms and softmax are
    float32 (float64 where x is). impl: "auto" takes what `kernels.routes` has for these channels and dtype (see
    kernels.check); without, the Triton kernels on a GPU (float32, float16, bfloat16; C and D up to 512; the composed
    form beyond), and the chunked PyTorch reference on a CPU. "triton", "reference", "composed" and "compiled" (plain
    PyTorch with all in memory, as it is or through torch.compile) never fall back.
    Differentiable once in every tensor, bitwise repeatable on one machine. Raises ValueError naming the argument.

    Source: METHOD of this project after Wang et al., arXiv 2302.06898 (their code is not public: the form is ours).
    """
    check_maps({"x": x, "p": p})
    C, D = x.shape[1], p.shape[1]
    if p.shape[2:] != x.shape[2:]:
        raise ValueError(f"p: size {list(p.shape[2:])} differs from x's size {list(x.shape[2:])}")
    if not isinstance(heads, int) or heads < 1 or C % heads:
        raise ValueError(f"heads: {heads!r} must be a positive integer that divides x's {C} channels")
    if not eps > 0:
        raise ValueError(f"eps: {eps!r} must be positive")
    given = Weights(norm_weight, norm_bias, query_weight, key_weight, value_weight, temperature, out_weight, scale)
    shapes = Weights((C,), (C,), (C, C), (C, D), (C, D), (heads,), (2 * C, C), (C,))
    names = (
        "norm_weight",
        "norm_bias",
        "query_weight",
        "key_weight",
        "value_weight",
        "temperature",
        "out_weight",
        "scale",
    )
    check_parameters({name: pair for name, *pair in zip(names, given, shapes, strict=True)}, "x", x)
    limits = [
        f"{name} has {size} channels, the kernels take up to {MAX_CHANNELS}"
        for name, size in (("x", C), ("p", D))
        if size > MAX_CHANNELS
    ]
    chosen, x = routes.chosen(("attention", C, D, x.dtype), x) if impl == "auto" else (None, x)
    route = choose(impl, x, limits, chosen)
    routes.note_attention(x, p, heads)
    acc = accumulator(x.dtype)
    # The operators are opaque to autocast: every dtype is settled here, whatever region the caller is in.
    with torch.autocast(x.device.type, enabled=False):
        p = p.to(x.dtype)
        if route in ("composed", "compiled"):
            call = (composed_attention, x, p, given, float(eps))
            y = compiled.run(*call) if route == "compiled" else call[0](*call[1:])
            return y.contiguous(memory_format=memory_format(x))
        weights = [weight.to(acc).contiguous() for weight in given]
        x = as_plane(x)
        return SemanticAttention.apply(x, plane_like(p, x), *weights, float(eps), route == "triton")
