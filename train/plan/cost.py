"""What a run will cost on a cluster, before it is started: memory, bytes on the wire, step time, loader, checkpoints.

What is counted comes from the model itself (parameters, multiply-accumulates, activations) and from the collectives
that DeepSpeed 0.19.8 was seen to issue (tests/train/plan/test_cost.py counts them in small runs). What is assumed,
the hardware's speeds, stands in `Cluster` and is printed with the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.summary import fake_copy
from train.config.schema import Config

# ZeRO-3 releases a gathered parameter between forward and backward only where more elements than this lie in between
# (stage3_max_reuse_distance and stage3_max_live_parameters), so smaller networks are gathered once a step.
GATHERED_ONCE = 1_000_000_000
BACKWARD = 2  # a backward pass costs two forward passes' multiply-accumulates, and about twice their operators
TOUCHES = 6  # an activation is written and read in the forward pass, read in the backward pass, its gradient likewise
PAIRS_PER_CORE = 88.6  # default blur mix, 256 px crops, one core (docs/LOG.md); it scales with the crop's area


@dataclass(frozen=True)
class Cluster:
    """Hardware: GPUs per node, and speeds as vendors state them, with the share of them that is expected in practice.

    tflops: dense peak of a GPU in the run's precision; utilisation: share of it that matrix products and convolutions
    reach; hbm: GB/s of a GPU's memory; launch: microseconds an operator takes to launch. nvlink: GB/s a GPU inside its
    node; network: GB/s a node in one direction; latency: microseconds of a collective without bytes; storage: GB/s that
    a checkpoint is written with; memory: GiB a GPU.
    """

    nodes: int
    gpus: int
    tflops: float = 989.0
    utilisation: float = 0.4
    hbm: float = 3350.0
    launch: float = 6.0
    nvlink: float = 450.0
    network: float = 400.0
    latency: float = 30.0
    storage: float = 2.0
    memory: float = 80.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (value > 0 or (value == 0 and name in ("launch", "latency"))):
                raise ValueError(f"--{name} {value}: must be more than 0")

    @property
    def world(self) -> int:
        """Ranks."""
        return self.nodes * self.gpus

    @property
    def bus(self) -> float:
        """GB/s of a ring over all ranks: its slowest part."""
        links = [self.nvlink] if self.gpus > 1 or self.nodes == 1 else []
        return min(links + ([self.network] if self.nodes > 1 else []))


@dataclass(frozen=True)
class Collective:
    """Calls of one kind in an optimizer step: payload in bytes of a rank, summed over the calls, and how many those
    are where it matters (ZeRO-3 gathers tensor by tensor)."""

    op: str
    what: str
    payload: int
    calls: int = 1

    def wire(self, world: int) -> float:
        """Bytes a rank sends in a ring: (N−1)/N of the payload, twice that for an all-reduce (which is a
        reduce-scatter and an all-gather)."""
        return self.payload * (world - 1) / world * (2 if self.op == "all_reduce" else 1)


@dataclass(frozen=True)
class Gradients:
    """Trained elements by what torch_autocast does with them: `low` belongs to convolutions and linear layers, whose
    gradients DeepSpeed reduces in bf16 then; `full` is the rest. tensors: how many parameters that are."""

    low: int
    full: int
    tensors: int

    @property
    def count(self) -> int:
        """All trained elements."""
        return self.low + self.full


def gradients_of(network: nn.Module) -> Gradients:
    """Count a network's trained elements (on any device, meta too)."""
    low = {
        id(parameter): parameter.numel()
        for module in network.modules()
        if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad
    }
    every = {id(p): p.numel() for p in network.parameters() if p.requires_grad}
    return Gradients(sum(low.values()), sum(every.values()) - sum(low.values()), len(every))


def collectives(config: Config, gradients: Gradients, zero: int) -> list[Collective]:
    """What DeepSpeed moves in one optimizer step under a ZeRO stage, but for messages of a few bytes.

    Stages 1 and 2 all-reduce the gradients' buckets (`use_multi_rank_bucket_allreduce`) and all-gather the parameters,
    1.5 times stage 0; stages 2 and 3 reduce at every micro-batch. Stage 0 reduces in the parameters' own type.
    """
    accumulation = config.train.accumulation
    half = config.engine.precision in ("bf16_params", "fp16")
    parameter_bytes = (2 if half else 4) * gradients.count
    reduced = parameter_bytes
    if config.engine.precision == "bf16" and zero > 0:
        reduced = 2 * gradients.low + 4 * gradients.full
    reductions = accumulation if zero >= 2 else 1
    if zero == 0:
        return [Collective("all_reduce", "gradients", reduced)]
    if zero < 3:
        return [
            Collective("all_reduce", "gradients", reduced * reductions),
            Collective("all_gather", "parameters", parameter_bytes),
        ]
    gathers = 1 if gradients.count <= GATHERED_ONCE else 2 * accumulation
    return [
        Collective("reduce_scatter", "gradients", reduced * reductions),
        Collective("all_gather", "parameters", parameter_bytes * gathers, gradients.tensors * gathers),
    ]


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step: what is computed; what is moved (one after the other: overlap_comm is off); the
    update (clipping, AdamW, average); and the wait for the slowest rank."""

    compute: float
    communication: float
    update: float = 0.0
    wait: float = 0.0

    @property
    def total(self) -> float:
        """Seconds a step."""
        return self.compute + self.communication + self.update + self.wait

    @property
    def efficiency(self) -> float:
        """Share of the step that computes."""
        return self.compute / self.total


@dataclass(frozen=True)
class Work:
    """What a rank computes in an optimizer step: FLOPs of products and convolutions, bytes that activations move
    through the GPU's memory, operators launched."""

    flops: float
    bytes: float
    launches: float


def step_work(
    config: Config, micro: int, macs: int, teacher_macs: int, activations: float, operators: int, teacher_operators: int
) -> Work:
    """The work of a step from counts of a forward pass: MACs of one image; bytes that a micro-batch keeps for its
    backward pass; operators. Student and restorer run forward, backward, and forward again under checkpointing; the
    teacher forward."""
    passes = 1 + BACKWARD + (1 if config.engine.checkpointing else 0)
    runs = config.train.accumulation
    return Work(
        2.0 * (passes * macs + teacher_macs) * micro * runs,
        TOUCHES * activations * runs,
        (passes * operators + teacher_operators) * runs,
    )


# A parameter: its gradient for the norm, clipped, and used; weight, both moments and average, read and written.
UPDATE_BYTES = 12 + 4 + 32
SPREAD = 0.03  # deviation of the ranks' step times relative to their mean


def step_time(cluster: Cluster, work: Work, moved: Iterable[Collective], updated: float = 0.0) -> StepTime:
    """Expected seconds of a step: the GPU's arithmetic and memory traffic one after the other, or the host's launches
    where those take longer (small batches, no torch.compile); then the collectives; then the update of `updated`
    parameters a rank. The slowest of N ranks takes SPREAD·√(2 ln N) longer than their mean (the maximum of normal
    numbers), and a collective's latency grows with the depth of its tree, log₂ of the nodes."""
    gpu = work.flops / (cluster.tflops * 1e12 * cluster.utilisation) + work.bytes / (cluster.hbm * 1e9)
    latency = cluster.latency * 1e-6 * (1 + math.log2(cluster.nodes))
    seconds = sum(each.wire(cluster.world) / (cluster.bus * 1e9) + each.calls * latency for each in moved)
    compute = max(gpu, work.launches * cluster.launch * 1e-6)
    wait = SPREAD * math.sqrt(2 * math.log(cluster.world)) * compute
    update = updated * UPDATE_BYTES / (cluster.hbm * 1e9)
    return StepTime(compute, seconds if cluster.world > 1 else 0.0, update, wait)


def operators_of(network: nn.Module, crop: int) -> int:
    """Operators that a forward pass of one crop launches, views not counted, on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        twin, image = fake_copy(network).eval(), torch.empty(1, 3, crop, crop)
        with _Counter() as counter:
            twin(image)
    return counter.count


class _Counter(TorchDispatchMode):
    """Counts operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not views and func.namespace != "prim"
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Loader:
    """What a node must read and compute to feed its GPUs: pairs/s, MB/s from the shards, cores for blur and decode."""

    pairs: float
    megabytes: float
    cores: float


def loader_need(config: Config, cluster: Cluster, step: StepTime, sample_bytes: float) -> Loader:
    """The loader's work on one node; sample_bytes: mean size of a photograph in the shards."""
    pairs = config.train.batch / cluster.nodes / step.total
    area = (config.data.crop / 256) ** 2
    return Loader(pairs, pairs / config.data.crops_per_decode * sample_bytes / 1e6, pairs * area / PAIRS_PER_CORE)


def checkpoint_bytes(network: nn.Module) -> int:
    """Bytes of one checkpoint on disk, but for small files: fp32 weights, AdamW's moments and averages, whatever the
    stage and precision, and the exported averages with everything that is not trained."""
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    kept = sum(p.numel() for p in network.parameters()) - trained
    kept += sum(b.numel() for b in network.buffers() if b.is_floating_point())
    return 20 * trained + 4 * kept


@dataclass(frozen=True)
class Stage:
    """A ZeRO stage's memory (bytes a rank, and whether they fit), moved bytes and step."""

    zero: int
    memory: float
    fits: bool
    moved: list[Collective]
    step: StepTime


def best_stage(stages: Iterable[Stage]) -> Stage | None:
    """The fastest stage that fits; the lower one where two are equally fast. None if none fits."""
    return min((stage for stage in stages if stage.fits), key=lambda s: (round(s.step.total, 9), s.zero), default=None)


def with_stage(config: Config, zero: int) -> Config:
    """The configuration under another ZeRO stage."""
    offload = config.engine.offload if zero else "none"
    return config.model_copy(update={"engine": config.engine.model_copy(update={"zero": zero, "offload": offload})})
