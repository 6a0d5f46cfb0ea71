"""How large a model is: parameters and multiply-accumulates, counted on fake tensors, where nothing is computed."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import kernels  # noqa: F401 - registers the operator that is counted here


def _semantic_attention_flops(x_shape, p_shape, *_, **__) -> int:
    """Count both passes over the pixels: the three Gram matrices x̂x̂ᵀ, x̂pᵀ, ppᵀ, then the product [g; b] = M p."""
    B, C, H, W = x_shape
    D = p_shape[1]
    return 2 * B * H * W * (C * C + C * D + D * D + 2 * C * D)


def _attention_flops(query, key, value, *_, **__) -> int:
    """Count both products of scaled dot-product attention; the counter does not know the operator it is on a CPU."""
    *batch, queries, channels = query
    return 2 * math.prod(batch) * queries * key[-2] * (channels + value[-1])


FORMULAS = {
    torch.ops.sharpprior.semantic_attention: _semantic_attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}


@dataclass(frozen=True)
class Summary:
    """Counts of a model, and by its parts (the prior's are `student` and `fusion`); MACs are those of one image of
    `size` (height, width) px."""

    size: tuple[int, int]
    parameters: int
    trainable: int
    macs: int
    parts: dict[str, tuple[int, int]]  # name → (parameters, MACs)


def summarize(model: nn.Module, size: tuple[int, int] = (256, 256)) -> Summary:
    """Count `model`, which takes an image [1, 3, H, W] of `size`; its weights are not touched, its device is any.

    MACs are the matrix products and convolutions of the forward pass (element-wise work, bilinear sampling and C×C
    algebra are not counted), as in the field's tables. A copy without memory is run, so a model of any size is counted
    in seconds, also one on the meta device (whose own tensors cannot run: autocast does not know them).
    """
    with FakeTensorMode(), torch.no_grad():
        twin = fake_copy(model).eval()
        with FlopCounterMode(display=False, depth=None, custom_mapping=FORMULAS) as counter:
            twin(torch.empty(1, 3, *size, device="cpu"))
    counts = counter.get_flop_counts()
    root = type(twin).__name__
    parts = {}
    for name, part in twin.named_children():
        if name == "prior":
            whole, student = (sum(counts.get(f"{root}.{key}", {}).values()) // 2 for key in ("prior", "prior.student"))
            parts["student"] = (_count(part.student), student)
            parts["fusion"] = (_count(part) - _count(part.student), whole - student)
            continue
        # A container is never called itself: its members are.
        called = [f"{name}.{key}" for key in part] if isinstance(part, nn.ModuleDict) else [name]
        macs = sum(sum(counts.get(f"{root}.{key}", {}).values()) for key in called) // 2
        parts[name] = (_count(part), macs)
    if "spe" in parts:  # the backbone calls its embeddings, so it was charged for them too
        parts["backbone"] = (parts["backbone"][0], parts["backbone"][1] - parts["spe"][1])
    return Summary(size, _count(model), _count(model, trainable=True), counter.get_total_flops() // 2, parts)


def fake_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy the structure with fake CPU tensors in place of the weights, its parameters in `dtype` (None: their own);
    called under a FakeTensorMode. No memory, no reading."""
    memo = {}
    for tensor in (*model.parameters(), *model.buffers()):
        parameter = isinstance(tensor, nn.Parameter)
        twin = torch.empty(tensor.shape, dtype=(dtype if parameter else None) or tensor.dtype, device="cpu")
        memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if parameter else twin
    return copy.deepcopy(model, memo)


def _count(module: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)
