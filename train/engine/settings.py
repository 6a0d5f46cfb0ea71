"""What DeepSpeed is told for a configuration: its settings, the optimizer's groups, the buckets."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from train.config.schema import Config, EngineSection
from train.engine.precision import (
    precision_settings,
)

PARTED = ("prior", "spe", "gate")  # whose parameters' names begin so; all others are the restorer's

BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
TYPES = ("torch_autocast", "bf16", "bfloat16", "fp16", "amp")
PARTS = ("optimizer", "scheduler", "activation_checkpointing", "compile", "zero_force_ds_cpu_optimizer")
OURS = (*BATCH, *TYPES, *PARTS)  # what the configuration's own fields say to DeepSpeed
OURS_ZERO = ("stage", "overlap_comm", "offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_params")


def parameter_groups(module: nn.Module, config: Config) -> list[dict[str, Any]]:
    """AdamW's groups: {student and fusion, embeddings, gate, everything else} × {matrices decay, vectors do not}; none
    is empty. Each says its `part`: prior, spe, gate or restorer."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), parameter.ndim > 1), []).append(parameter)
    return [
        {"params": params, "part": part, "weight_decay": config.optim.weight_decay if decays else 0.0}
        for (part, decays), params in groups.items()
    ]


def part_of(name: str) -> str:
    """Whose parameter it is, by its name: prior, spe, gate or restorer."""
    return next((part for part in PARTED if name.startswith(f"{part}.")), "restorer")


def deepspeed_settings(config: Config, world: int) -> dict[str, Any]:
    """DeepSpeed's dictionary for a run: ours, with `engine.deepspeed` merged over it."""
    engine = config.engine
    zero: dict[str, Any] = {"stage": engine.zero, "overlap_comm": engine.overlap_comm}
    pinned = torch.cuda.is_available()
    if engine.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    if engine.offload_parameters == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch(world),
        "gradient_accumulation_steps": config.train.accumulation,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
        # Else DeepSpeed refuses our AdamW with offloading, and Accelerate 1.15 replaces it by an Adam with L2 decay.
        "zero_force_ds_cpu_optimizer": False,
        **precision_settings(engine),
    }
    for key, value in engine.deepspeed.items():
        if key in OURS:
            raise ValueError(f"engine.deepspeed.{key} is set by the configuration's own fields: use those")
        if key == "zero_optimization":
            if not isinstance(value, dict):
                raise ValueError(f"engine.deepspeed.zero_optimization: expected settings, not {value!r}")
            taken = [name for name in value if name in OURS_ZERO]
            if taken:
                raise ValueError(f"engine.deepspeed.zero_optimization.{taken[0]} is set by the engine's own fields")
            zero.update(value)
        elif isinstance(value, dict) and isinstance(settings.get(key), dict):
            settings[key] = {**settings[key], **value}
        else:
            settings[key] = value
    return settings


DEEPSPEED_BUCKET = 500_000_000  # elements, its default


def bucket_elements(engine: EngineSection, trained: int) -> int:
    """Elements of each bucket in which ZeRO 1 to 3 reduce gradients: as many as there are, at most DeepSpeed's default,
    because it allocates its buckets whole."""
    given = engine.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size")
    return int(given or min(DEEPSPEED_BUCKET, trained))
