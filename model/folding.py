"""Frozen batch norms folded into the convolutions before them: the same function with one operator less a pair.

A BatchNorm on stored statistics is y = γ·(x − μ)/σ + β a channel, and the convolution before it is linear: scaled
weights γ/σ·W and a bias β + (b − μ)·γ/σ give the same (Jacob et al., CVPR 2018, section 3.2), to rounding.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Whose forward pass uses `weight` and `bias` as they are stored: a subclass may standardise them first.
CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
NORMS = (nn.BatchNorm2d, BatchNormAct2d)


def foldable(net: nn.Module, example: tuple[Any, ...], method: str = "forward", **keywords: Any) -> dict[str, str]:
    """Which BatchNorm (by name) may be folded into which convolution: {norm: convolution}, as a run on `example` shows.

    A pair is one whose BatchNorm, on stored statistics, is the only reader of what the convolution gave, each of them
    called once. Whatever else stands there (a norm before its convolution, a result read twice, a weight that is
    standardised) is left out. `net` is run in eval mode without gradient, and left in the mode it came in.
    """
    convolutions = {module: name for name, module in net.named_modules() if type(module) in CONVOLUTIONS}
    norms = {
        module: name
        for name, module in net.named_modules()
        if type(module) in NORMS and module.running_mean is not None
    }
    made: dict[int, tuple[Tensor, nn.Module]] = {}  # by the result's id; kept, so that no id comes twice
    read: list[tuple[nn.Module, int, nn.Module]] = []  # norm, the result it reads, the convolution that gave it
    calls: Counter[nn.Module] = Counter()

    def after_convolution(module: nn.Module, _: Any, result: Tensor) -> None:
        calls[module] += 1
        made[id(result)] = (result, module)
        readers.counts[id(result)] = 0  # those of an earlier tensor that had this id

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[module] += 1
        if (result := id(inputs[0])) in made:
            read.append((module, result, made[result][1]))

    modes, readers = {module: module.training for module in net.modules()}, _Readers()
    hooks = [module.register_forward_hook(after_convolution) for module in convolutions]
    hooks += [module.register_forward_pre_hook(before_norm) for module in norms]
    try:
        with torch.no_grad(), readers:
            getattr(net.eval(), method)(*example, **keywords)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    pairs = {}
    for norm, result, convolution in read:
        if calls[norm] == calls[convolution] == readers.counts[result] == 1:
            pairs[norms[norm]] = convolutions[convolution]
    return pairs


def folded(net: nn.Module, pairs: dict[str, str]) -> nn.Module:
    """A copy of `net` for inference with these pairs folded (computed in fp64, kept in the weights' dtype); `net` keeps
    its modules and names. The activation of a timm BatchNormAct2d stays; no parameter of the copy takes a gradient."""
    twin = copy.deepcopy(net).eval().requires_grad_(False)
    for norm_name, name in pairs.items():
        norm, convolution = twin.get_submodule(norm_name), twin.get_submodule(name)
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale * norm.weight.double() if norm.weight is not None else scale
        shift = -norm.running_mean.double() * scale
        shift = shift + norm.bias.double() if norm.bias is not None else shift
        if convolution.bias is not None:
            shift = shift + convolution.bias.double() * scale
        weight = convolution.weight
        convolution.weight = _fixed(weight.double() * scale.view(-1, 1, 1, 1), weight)
        convolution.bias = _fixed(shift, weight)
        parent, _, last = norm_name.rpartition(".")
        rest = [norm.drop, norm.act] if isinstance(norm, BatchNormAct2d) else []
        rest = [module for module in rest if not isinstance(module, nn.Identity)]
        setattr(twin.get_submodule(parent), last, nn.Sequential(*rest) if rest else nn.Identity())
    return twin


def _fixed(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(like.dtype).contiguous(), requires_grad=False)


class _Readers(TorchFunctionMode):
    """Counts, by a tensor's id, the functions that read it and give tensors (its shape may be asked for)."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(True for _ in _tensors(result)):
            self.counts.update({id(tensor): 1 for tensor in _tensors((args, kwargs or {}))})
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
