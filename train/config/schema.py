"""The typed configuration: what a YAML file may say, with units and defaults; `train/config/file.py` reads it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from data.blur import BlurConfig
from data.stream.config import StreamConfig
from model.config import ModelConfig


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class RunSection(Section):
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's folder is `root/name`."""
    root: str = "runs"
    """Folder of all runs."""
    seed: int = Field(default=0, ge=0)
    """Seed of weights, order, crops and blur."""

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.root).expanduser() / self.name


class SourceSection(Section):
    path: str
    """Folder or URL of a shard set."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Share of all pairs, relative to the other sources' weights."""


def _one_source(given: object) -> object:
    """A plain path stands for a list of one source."""
    return [{"path": given}] if isinstance(given, str) else given


class CacheSection(Section):
    folder: str | None = None
    """Node-local folder for shards of remote sets; None: below the system's temporary folder."""
    limit_gib: float = Field(default=64.0, gt=0)
    """Size above which the least recently used shards go, GiB. Two windows of shards should fit."""


class DataSection(StreamConfig):
    train: Annotated[list[SourceSection], BeforeValidator(_one_source)] | None = None
    """Training shards: a folder or URL (with index.json), or a list of {path, weight} mixed into one stream. None:
    `$SHARPPRIOR_DATA`, else the bundled photographs."""
    val: str | None = None
    """Validation shards. None: `$SHARPPRIOR_DATA/val` where that exists, else the bundled val photographs."""
    cache: CacheSection = CacheSection()
    """Where shards of remote sets are kept."""


def _switch(given: object) -> object:
    """YAML 1.1 reads a bare off and on as booleans."""
    return {True: "on", False: "off"}.get(given, given) if isinstance(given, bool) else given


class FeatureSection(Section):
    cache: Annotated[Literal["off", "auto", "on"], BeforeValidator(_switch)] = "off"
    """Node-local cache of the teacher's features of the planned crop boxes. auto: kept only where reading a feature
    measures cheaper than computing it; on: always; off: never."""
    folder: str | None = None
    """Folder of the cache; None: below the system's temporary folder. Each teacher, crop plan and dtype has its own
    folder in it; the ranks of a node share it, and the next run finds it again."""
    dtype: Literal["fp16", "int8"] = "fp16"
    """Stored form: fp16, or int8 with one scale a channel."""
    limit_gib: float = Field(default=64.0, gt=0)
    """Size at which writing stops, GiB; what is cached by then stays of use. Room for the whole plan of crops:
    photographs × data.boxes_per_photo × bytes of a crop (`sharpprior plan` says them)."""
    check_every: int = Field(default=2000, ge=0)
    """Hits of a rank between recomputations of a cached crop, compared with what was read; 0: never."""


class LossSection(Section):
    pixel: str = "charbonnier"
    """Restoration loss on pixels in [0, 1]: a name of `TERMS` (train/objective/restoration.py), such as l1."""
    frequency: float = Field(default=1.0, ge=0)
    """Weight of the L1 distance of orthonormal Fourier transforms."""
    terms: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Weights of further terms of that table, by name."""
    extent: float = Field(default=0.1, ge=0)
    """Weight of the error of the blur's extent that model.gate predicts, |log₂ of (1 + px)|, of pairs whose extent is
    known."""
    cfl: float = Field(default=0.1, ge=0)
    """Weight λ of cross-level feature learning beside the restoration loss; in distill steps its weight is 1."""
    cfl_final: float | None = Field(default=None, ge=0)
    """λ at the last step, reached over the deblur steps; None: λ does not change."""
    cfl_schedule: Literal["cosine", "linear"] = "cosine"
    """How λ goes from `cfl` to `cfl_final`."""
    match: str = "cross_level"
    """What the structure term compares at each level, a name of `MATCHES` (train/objective/matching.py): cross_level:
    standardised features, on pooled grids too (hierarchical context loss); same_level: the same without pooled grids,
    and without fusion (needs student.fusion same_level); cosine: their direction at each position; attention: maps of
    squared activation."""
    structure: float = Field(default=1.0, ge=0)
    """Weight of CFL's per-level term, the one that `match` chooses."""
    context: float = Field(default=1.0, ge=0)
    """Weight of CFL's global context term."""
    logits: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence of class logits through the teacher's frozen head."""
    statistics_crops: int = Field(default=64, ge=8, multiple_of=8)
    """Training crops on which the teacher's (and student's) channel statistics are measured, once, at the start."""


class OptimSection(Section):
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate of AdamW."""
    prior_lr_scale: float = Field(default=1.0, ge=0)
    """Learning rate of the student and its fusion, relative to `lr`."""
    spe_lr_scale: float = Field(default=1.0, ge=0)
    """Learning rate of the embeddings, relative to `lr`."""
    backbone_lr_scale: float = Field(default=1.0, ge=0)
    """Learning rate of the backbone, relative to `lr`: below 1 to finetune a pretrained one; 0 leaves it as it is, and
    spares its gradients."""
    gate_lr_scale: float = Field(default=1.0, ge=0)
    """Learning rate of the gate, relative to `lr`."""
    betas: tuple[float, float] = (0.9, 0.9)
    """AdamW's decay rates."""
    weight_decay: float = Field(default=1e-3, ge=0)
    """Decoupled decay of matrices and kernels; biases, norms and scales have none."""
    clip: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    warmup: int = Field(default=100, ge=0)
    """Steps of linear warm-up."""
    final_lr: float = Field(default=0.01, ge=0, le=1)
    """The cosine ends at `final_lr`·`lr`."""
    hold: int = Field(default=0, ge=0)
    """Steps at the peak between warm-up and cosine."""
    halve_every: int | None = Field(default=None, ge=1)
    """Halve the learning rate every so many steps, instead of the cosine."""

    @model_validator(mode="after")
    def _one_schedule(self) -> OptimSection:
        if self.halve_every is not None and self.hold:
            raise ValueError("hold waits for the cosine, which halve_every replaces: set one of them")
        return self


class PatchSection(Section):
    at: int = Field(ge=1)
    """0-based step from which on these hold."""
    crop: int = Field(ge=32)
    """Side of a training crop, px."""
    batch: int | None = Field(default=None, ge=1)
    """Global batch; None: train.batch."""


class TrainSection(Section):
    steps: int = Field(default=1000, ge=1)
    """Optimizer steps of the whole run."""
    distill_steps: int = Field(default=0, ge=0)
    """The first of them train the student alone (stage `distill`); the others train all (stage `deblur`)."""
    spe_steps: int = Field(default=0, ge=0)
    """The first after those train the embeddings alone (stage `spe`), for a prior new to a pretrained backbone."""
    student_frozen: bool | None = None
    """Whether the prior network (student and fusion) rests after the distill steps: no gradient, nothing kept for a
    backward pass, no feature losses, no teacher. None: where it comes from another run (model.prior_from)."""
    batch: int = Field(default=8, ge=1)
    """Global batch: pairs per optimizer step over all ranks and accumulation steps."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches per optimizer step and rank."""
    progressive: list[PatchSection] = Field(default_factory=list)
    """Progressive patches: later crops and batches as a list of {at, crop, batch}; data.crop and train.batch are the
    first ones. The stream goes on at the next pair, and a run resumes exactly on either side of a change."""
    ema: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the fp32 average of the weights; evaluation and restoration use it; 0 keeps the weights."""
    log_every: int = Field(default=1, ge=1)
    """Steps between records in metrics.jsonl."""
    max_bad_steps: int = Field(default=3, ge=1)
    """Steps in a row whose loss or gradients are not finite that end the run (before that they move no weight); ten
    times as many among the last 1000 steps end it too."""

    @model_validator(mode="after")
    def _divides(self) -> TrainSection:
        if self.distill_steps > self.steps:
            raise ValueError(f"distill_steps {self.distill_steps} exceeds steps {self.steps}")
        if self.distill_steps + self.spe_steps > self.steps:
            raise ValueError(
                f"distill_steps {self.distill_steps} and spe_steps {self.spe_steps} exceed steps {self.steps}"
            )
        if self.batch % self.accumulation:
            raise ValueError(f"accumulation {self.accumulation} does not divide batch {self.batch}")
        steps = [each.at for each in self.progressive]
        if any(b <= a for a, b in pairwise(steps)):
            raise ValueError(f"progressive: the steps {steps} must rise: each entry holds from its `at` on")
        for each in self.progressive:
            if each.batch and each.batch % self.accumulation:
                raise ValueError(f"accumulation {self.accumulation} does not divide batch {each.batch} of progressive")
        return self


class EngineSection(Section):
    zero: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: 1 divides Adam's state among the ranks, 2 gradients too, 3 parameters too."""
    precision: Literal["auto", "fp32", "bf16", "bf16_params", "fp16"] = "fp32"
    """fp32; bf16: torch.autocast over fp32 parameters, the usual choice on GPUs; bf16_params: parameters and gradients
    in bf16 beside a fp32 master copy, saves memory (ZeRO ≥ 1); fp16: the same in fp16 with a dynamic loss scale, for
    GPUs without bf16 (ZeRO ≥ 1). auto: bf16 on a GPU that computes it, else fp32; one rank on a CPU measures both at
    the start, and takes bf16 where it is 5 % faster; a run that goes on keeps what it took."""
    offload: Literal["none", "cpu"] = "none"
    """Where Adam's state lives and is updated (cpu needs ZeRO ≥ 1)."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Where parameters live that are not in use (cpu needs ZeRO 3)."""
    checkpointing: bool = False
    """Keep only the inputs of residual blocks and embeddings for the backward pass, and compute the rest again: less
    memory, about a third more time, the same losses."""
    channels_last: bool | Literal["auto"] = "auto"
    """Images and feature maps with neighbouring channels side by side in memory, which convolutions on GPUs prefer;
    auto: on a GPU."""
    graphs: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    """Replay the passes of the network and of its teacher as CUDA graphs: small batches then wait for the GPU and not
    for launches; the same losses. auto: on a GPU where it is possible, else a line says why not; on: refuse to run
    where it is not."""
    compile: bool = False
    """Run the network through torch.compile: minutes at the start, faster steps (needs a C++ compiler)."""
    overlap_comm: bool = False
    """Overlap of gradient reduction with the backward pass (ZeRO ≥ 1)."""
    cpu_threads: int | None = Field(default=None, ge=1)
    """Threads per rank without a GPU; None shares the cores among the ranks of the node."""
    timeout_minutes: int = Field(default=30, ge=1)
    """Limit of one collective call, and of the wait for all ranks at the start."""
    health_check: bool = True
    """Before training, time a matrix product on every rank and check what collectives deliver."""
    stall_minutes: float = Field(default=10.0, gt=0)
    """Time without progress of a rank after which it ends, with the stacks of its threads in stacks-rank-N.txt; three
    times as long at the start, in the first step, while saving and at the end; never before data.stall_minutes."""
    silent_minutes: float = Field(default=3.0, gt=0)
    """Time without a sign of life (heartbeat/rank-N.json) of another rank after which the run ends, if steps do not go
    on either; three times as long where stall_minutes is. A dead process of the same machine is seen in seconds."""
    deepspeed: dict = Field(default_factory=dict)
    """Further DeepSpeed settings, merged over ours; a key that a field here sets is refused."""

    @model_validator(mode="after")
    def _possible(self) -> EngineSection:
        if self.zero == 0:
            # DeepSpeed 0.19.8 ignores an offload without ZeRO, and its optimizer for 16-bit parameters without ZeRO
            # takes other steps than every other stage (docs/LOG.md).
            for name in ("precision", "offload", "overlap_comm"):
                value = getattr(self, name)
                if value in ("bf16_params", "fp16", "cpu", True):
                    shown = str(value).lower() if isinstance(value, bool) else value
                    raise ValueError(f"{name} {shown} needs zero 1, 2 or 3, which also work on one rank")
        if self.graphs == "on" and (reason := self.no_graphs) is not None:
            raise ValueError(f"graphs on: {reason}; set it to auto")
        if self.offload_parameters == "cpu" and self.zero != 3:
            raise ValueError(f"offload_parameters cpu needs zero 3: zero {self.zero} keeps whole parameters")
        return self

    @property
    def no_graphs(self) -> str | None:
        """Why passes cannot be captured under these settings, None if they can."""
        if self.zero == 3:
            return "under zero 3 parameters are gathered and let go in every pass"
        return "compile has launches of its own: choose one of the two" if self.compile else None


class ProfileSection(Section):
    step: int | None = Field(default=None, ge=1)
    """First step of the window, from 1; None: ten steps after the start."""
    steps: int = Field(default=3, ge=1, le=100)
    """Steps in the window; a trace takes megabytes a step."""


class KernelSection(Section):
    check: bool = True
    """On a GPU, compare the kernels with fp64 for this run's own shapes before the first step, and replace what is
    wrong by what is right, saying so (docs/KERNELS.md). Findings are kept: minutes once, and nothing after."""
    strict: bool = False
    """Refuse to run where a kernel is wrong, instead of replacing it."""

    @model_validator(mode="after")
    def _possible(self) -> KernelSection:
        if self.strict and not self.check:
            raise ValueError("strict refuses what the check finds wrong, but check is false: set one of them")
        return self


class CheckpointSection(Section):
    every: int = Field(default=500, ge=1)
    """Steps between checkpoints; one is always written at the end."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints to keep, beside the best."""
    copy_to: str | None = None
    """fsspec URL (s3://…, file:///…) below which, in a folder of the run's name, every finished checkpoint is copied
    while training goes on; as many are kept there. `--resume auto` fetches the newest where the folder has none."""
    copy_wait: float = Field(default=300.0, ge=0)
    """Longest wait at the end of a run for the last copy, s."""


def _switched(given: object) -> object:
    """`eval: off`, which YAML 1.1 reads as false, stands for a section."""
    return {"enabled": given} if isinstance(given, bool) else given


class EvalSection(Section):
    enabled: bool = True
    """false (or `eval: off`): no validation; no set is read for it, nothing is scored, and there is no report."""
    every: int = Field(default=500, ge=0)
    """Steps between evaluations, beside those before the first step and after the last; 0: only those."""
    at_start: bool = True
    """Evaluate before the first step too, which on a CPU takes minutes."""
    crop: int = Field(default=256, ge=32)
    """Side of a validation crop, px."""
    per_tier: int = Field(default=2, ge=1)
    """Pairs per validation photograph and severity tier."""
    panels: int = Field(default=6, ge=1)
    """Rows of panel.png and of the panels in TensorBoard."""


class Config(Section):
    """Everything a run needs to be repeated."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    blur: BlurConfig = BlurConfig()
    model: ModelConfig = ModelConfig()
    features: FeatureSection = FeatureSection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    engine: EngineSection = EngineSection()
    kernels: KernelSection = KernelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: Annotated[EvalSection, BeforeValidator(_switched)] = EvalSection()
    profile: ProfileSection | None = None
    """A window of steps under torch's profiler; None: no profile."""

    @model_validator(mode="after")
    def _learnable(self) -> Config:
        loss = self.loss
        if self.train.distill_steps and not self.model.prior:
            raise ValueError("train.distill_steps trains the student alone, but model.prior is false: set one of them")
        if self.features.cache != "off" and not self.model.prior:
            raise ValueError("features.cache keeps a teacher's features, but model.prior is false: set one of them")
        if self.model.prior and self.train.distill_steps and not (loss.structure or loss.context or loss.logits):
            raise ValueError("train.distill_steps has nothing to learn: loss.structure, context and logits are all 0")
        if loss.match == "same_level" and self.model.student.fusion != "same_level":
            raise ValueError(
                "loss.match same_level compares levels without fusion: set model.student.fusion to same_level too"
            )
        if self.train.progressive and self.features.cache != "off":
            raise ValueError(
                "features.cache keeps features of one plan of crops, but train.progressive changes their size: set "
                "features.cache to off"
            )
        if not self.model.prior and (self.train.spe_steps or self.train.student_frozen):
            which = "spe_steps" if self.train.spe_steps else "student_frozen"
            raise ValueError(f"train.{which} is about the prior, but model.prior is false: set one of them")
        if self.model.prior_from is not None and self.train.distill_steps and self.train.student_frozen is None:
            raise ValueError(
                f"model.prior_from takes a distilled prior over, and train.distill_steps {self.train.distill_steps} "
                "would distill it further: set that to 0, or train.student_frozen to say whether it rests afterwards"
            )
        if self.student_rests and loss.cfl_final is not None:
            raise ValueError(
                "loss.cfl_final changes λ over the deblur steps, but the student is frozen then: leave it out, or set "
                "train.student_frozen to false"
            )
        if self.student_rests and not self.train.distill_steps and self.features.cache != "off":
            raise ValueError(
                "features.cache keeps a teacher's features, but the student is frozen from the start: set it to off"
            )
        if self.optim.backbone_lr_scale == 0 and not (self.model.prior or self.model.gate):
            raise ValueError(
                "optim.backbone_lr_scale 0 leaves the backbone as it is, and without a prior or a gate nothing else "
                "learns: set it above 0, or model.gate to true"
            )
        if self.model.oracle and (self.train.distill_steps or not self.student_rests):
            raise ValueError(
                "model.oracle has no use for a student that learns: set train.distill_steps to 0 and "
                "train.student_frozen to true"
            )
        if loss.cfl_final is not None and self.train.distill_steps == self.train.steps:
            raise ValueError("loss.cfl_final changes λ over the deblur steps, but all steps distill: leave it out")
        return self

    @property
    def student_rests(self) -> bool:
        """Whether the prior network learns nothing after the distill steps."""
        given = self.train.student_frozen
        return self.model.prior and (self.model.prior_from is not None if given is None else given)

    @property
    def taught(self) -> bool:
        """Whether the run needs its teacher: to learn from, or to measure a fresh prior's scales."""
        over = self.student_rests and not self.train.distill_steps and not self.model.oracle
        return self.model.prior and not (over and self.model.prior_from is not None)

    def micro_batch(self, world: int) -> int:
        """Pairs per rank and micro-batch, at first. ValueError if `world` ranks and the accumulation do not divide the
        batch, or a later one of train.progressive."""
        parts = world * self.train.accumulation
        later = [("train.progressive: batch", each.batch) for each in self.train.progressive if each.batch]
        for name, batch in [("train.batch", self.train.batch), *later]:
            if batch % parts:
                raise ValueError(
                    f"{name} {batch} is not divisible by {world} ranks × {self.train.accumulation} "
                    "accumulation steps: choose a multiple"
                )
        return self.train.batch // parts
