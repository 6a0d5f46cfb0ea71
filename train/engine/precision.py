"""Precision of a run: what DeepSpeed is told, what the network's forward pass runs under, and what cannot work here."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from timm.layers import Conv2dSame, conv2d_same
from torch import Tensor, nn

from train.config.schema import Config, EngineSection

# Dtype of matrix products and convolutions. `bf16` leaves parameters in fp32; the other two store them in 16 bits.
COMPUTE = {"bf16": torch.bfloat16, "bf16_params": torch.bfloat16, "fp16": torch.float16}
SIXTEEN_BIT_PARAMETERS = ("bf16_params", "fp16")


def planned(config: Config) -> Config:
    """The configuration with `engine.precision` auto as bf16, which a GPU takes: what a plan reckons with."""
    return with_precision(config, "bf16") if config.engine.precision == "auto" else config


def with_precision(config: Config, precision: str) -> Config:
    """The configuration with another `engine.precision`."""
    return config.model_copy(update={"engine": config.engine.model_copy(update={"precision": precision})})


def precision_settings(engine: EngineSection) -> dict[str, Any]:
    """DeepSpeed's settings for a precision.

    Gradients of 16-bit parameters accumulate in fp32 under ZeRO 2 and 3. Under ZeRO 1 that would take another optimizer
    of DeepSpeed, which keeps whole fp32 gradients on every rank: there they accumulate in the parameters' type.
    """
    if engine.precision == "bf16":
        return {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    wide = {"data_types": {"grad_accum_dtype": "fp32"}} if engine.zero >= 2 else {}
    if engine.precision == "bf16_params":
        return {"bf16": {"enabled": True}, **wide}
    if engine.precision == "fp16":
        # Dynamic: halved at an overflow (whose step is left out), doubled after 1000 steps without one.
        return {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 1}, **wide}
    return {}


def autocast(engine: EngineSection, device: torch.device) -> contextlib.AbstractContextManager:
    """The run's precision, for what runs outside DeepSpeed's forward pass (teacher, evaluation)."""
    dtype = COMPUTE.get(engine.precision)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def refuse_precision(engine: EngineSection, device: torch.device) -> None:
    """ValueError where the device cannot compute in the run's precision, or nobody has chosen one."""
    if engine.precision == "auto":
        raise ValueError("engine.precision auto: choose first (train/run/precision.py), or set fp32 or bf16")
    if engine.precision == "fp16":
        from deepspeed.accelerator import get_accelerator

        if not get_accelerator().is_fp16_supported():
            raise ValueError(
                f"engine.precision fp16: DeepSpeed does not support it on this {_name(device)}: use fp32 or bf16"
            )
    wants_bf16 = COMPUTE.get(engine.precision) == torch.bfloat16 and device.type == "cuda"
    if wants_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"engine.precision {engine.precision}: this {_name(device)} computes no bf16: use fp16 or fp32"
        )


def use_sixteen_bit_parameters(module: nn.Module, engine: EngineSection, device: torch.device) -> None:
    """Let a module whose parameters DeepSpeed turns to 16 bits take fp32 images: its forward runs under autocast, and
    BatchNorm computes with the fp32 statistics that it keeps. Names in the state dict stay."""
    if engine.precision not in SIXTEEN_BIT_PARAMETERS:
        return
    plain = module.forward

    @functools.wraps(plain)
    def forward(*inputs: Any, **keywords: Any) -> Any:
        # Inside the module: DeepSpeed turns off an autocast that surrounds its engine.
        with autocast(engine, device):
            return plain(*inputs, **keywords)

    module.forward = forward
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.__class__ = type(f"Wide{type(part).__name__}", (_WideBatchNorm, type(part)), {})


def keep_depthwise_in_fp32(module: nn.Module, engine: EngineSection, device: torch.device) -> int:
    """Under bf16 on a CPU, have depthwise convolutions compute in fp32, and give bf16 as before; returns their number.

    Their bf16 backward pass is slow there, with AMX too (docs/LOG.md). Weights, gradients and names stay: the modules
    keep their class, by which DeepSpeed chooses the type that gradients travel in, and our folding its pairs. Weights
    are rounded to bf16 first, as autocast does and as DeepSpeed's ZeRO 3 gathers them: else stages would differ.
    """
    if engine.precision != "bf16" or device.type != "cpu":
        return 0
    found = [part for part in module.modules() if isinstance(part, nn.Conv2d) and _depthwise(part)]
    for part in found:
        part.forward = functools.partial(_in_fp32, part)
    return len(found)


def _depthwise(convolution: nn.Conv2d) -> bool:
    known = type(convolution).forward in (nn.Conv2d.forward, Conv2dSame.forward)
    return known and convolution.groups == convolution.in_channels > 1


def _in_fp32(part: nn.Conv2d, image: Tensor) -> Tensor:
    if not torch.is_autocast_enabled("cpu"):
        return type(part).forward(part, image)
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        weight, bias = (None if p is None else p.to(dtype).float() for p in (part.weight, part.bias))
        if type(part).forward is Conv2dSame.forward:
            how = (part.stride, part.padding, part.dilation, part.groups)
            result = conv2d_same(image.to(dtype).float(), weight, bias, *how)
        else:
            result = part._conv_forward(image.to(dtype).float(), weight, bias)
    return result.to(dtype)  # else all that follows, and what is kept for the backward pass, would be wide as well


class _WideBatchNorm:
    """A BatchNorm whose forward pass sees scale and shift in the type of its statistics: torch's kernels take 16-bit
    inputs only with parameters all of one type, and DeepSpeed keeps buffers in fp32 beside 16-bit parameters."""

    @property
    def weight(self) -> Tensor | None:
        return self._wide("weight")

    @property
    def bias(self) -> Tensor | None:
        return self._wide("bias")

    def _wide(self, name: str) -> Tensor | None:
        value = self._parameters[name]
        return value if value is None or self.running_mean is None else value.to(self.running_mean.dtype)


def _name(device: torch.device) -> str:
    return f"GPU ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "CPU"
