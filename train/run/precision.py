"""`engine.precision: auto`: which of fp32 and bf16 a run takes, before its engine is made, and why."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from model.pretrained import CONFIG
from train.checkpoint.far import far_folder
from train.checkpoint.folder import Checkpoints
from train.config.file import ConfigError, load_config
from train.config.networks import build_model
from train.config.schema import Config
from train.engine.launch import world_size
from train.engine.network import shape_network
from train.engine.precision import with_precision

MARGIN = 0.05  # by so much bf16 has to be faster: its rounding is not free
ROUNDS = 3  # steps timed in each precision, after one that warms up
STEP_S, LIMIT_S = 1.5, 20.0  # a step of fp32 that the batch is cut down to; time after which no further round begins


def choose_precision(config: Config, resume: str | None) -> tuple[Config, str | None]:
    """The configuration with auto settled, and a line that says what was taken and why; another precision stays, with
    None. Every rank calls this before the engine is made, and comes to the same.

    A run that goes on (`resume`: auto or a checkpoint's path) keeps its own precision. Else a GPU takes bf16 where it
    computes it; one rank on a CPU measures; several take fp32, because each might measure something else.
    """
    if config.engine.precision != "auto":
        return config, None
    taken, why = _before(config, resume), "that of the run that goes on"
    if taken is None and torch.cuda.is_available():
        taken = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        why = "this GPU computes it" if taken == "bf16" else "this GPU computes no bf16"
    elif taken is None and world_size() > 1:
        taken, why = "fp32", "several ranks on CPUs do not measure; set bf16 where it is known to be faster"
    elif taken is None:
        taken, why = _measured(config)
    return with_precision(config, taken), f"engine.precision auto: {taken} ({why})"


def faster(fp32_s: float, bf16_s: float) -> str:
    """The precision to take for the times of a step."""
    return "bf16" if bf16_s <= (1 - MARGIN) * fp32_s else "fp32"


def time_steps(config: Config, clock: Callable[[], float] = time.perf_counter) -> tuple[int, float, float]:
    """Images, and seconds of a forward and backward pass of the run's own network on them, in fp32 and in bf16: the
    least of a few, taken in turn, so that what else the machine does counts little.

    Random images of the run's crop, as many as its micro-batch has, or fewer where a step of one image says that it
    would take long. Random weights of the run's seed; the ambient generator is neither used nor moved.
    """
    engine = config.engine.model_copy(update={"precision": "bf16", "compile": False})
    torch.set_num_threads(engine.cpu_threads or len(os.sched_getaffinity(0)))  # what the engine will set
    network = build_model(config, read_weights=False)
    if network.prior is not None and config.student_rests:
        network.prior.rest()
    shape_network(network, engine, torch.device("cpu"))  # of no effect in fp32 but for what both share
    shape, generator = (config.micro_batch(1), 3, config.data.crop, config.data.crop), torch.Generator().manual_seed(0)
    images = torch.rand(shape, generator=generator).contiguous(memory_format=torch.channels_last)  # as the loader's

    def step(batch: torch.Tensor, bf16: bool) -> float:
        started = clock()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = network(batch)
        learned = out.restored if config.student_rests or out.prior is None else (*out.restored, *out.prior)
        learned = learned if out.own is None else (*learned, out.own)  # a gate's image teaches the gate alone
        sum(each.float().square().mean() for each in learned).backward()
        return clock() - started

    began, single = clock(), step(images[:1], False)
    images = images[: max(1, int(STEP_S / max(single, 1e-6)))]
    fp32, bf16 = [], []
    while not fp32 or (len(fp32) <= ROUNDS and clock() - began < LIMIT_S):
        fp32.append(step(images, False))
        bf16.append(step(images, True))
    return len(images), min(fp32), min(bf16)


def _measured(config: Config) -> tuple[str, str]:
    count, fp32, bf16 = time_steps(config)
    taken = faster(fp32, bf16)
    images = f"{count} image{'s' if count > 1 else ''} of {config.data.crop} px"
    return taken, f"measured: a step of {images} takes {fp32:.3g} s in fp32, {bf16:.3g} s in bf16"


def _before(config: Config, resume: str | None) -> str | None:
    """The precision of the run that goes on; None where none does, or nothing of it is left (the session will say)."""
    if resume is None:
        return None
    if resume != "auto":
        return _of(Path(resume) / CONFIG)
    checkpoints = Checkpoints(config.run.folder / "checkpoints", config.checkpoint.keep)
    found = (_of(checkpoints.path(step) / CONFIG) for step in reversed(checkpoints.steps()))
    taken = next((each for each in found if each is not None), None)
    if taken is None and (far := far_folder(config, fresh=False)) is not None:
        text = far.newest_file(CONFIG)
        taken = None if text is None else _settled((yaml.safe_load(text) or {}).get("engine", {}).get("precision"))
    return taken


def _of(path: Path) -> str | None:
    try:
        return _settled(load_config(path).engine.precision)
    except ConfigError:  # damaged: an older one is of the same run
        return None


def _settled(precision: str | None) -> str | None:
    return precision if precision in ("fp32", "bf16") else None
