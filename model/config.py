"""Typed settings of the networks; the `model:` section of a training config.

Imports no torch, so that a wrong key is told at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class TeacherConfig(_Section):
    name: str = "efficientnet_lite0"
    """Any timm network with features at strides 4, 8, …, any plain vision transformer that takes images of any size, or
    `efficientnet_lite0`, `efficientnet_lite1`, `efficientnet_lite2`, whose weights are packages."""
    weights: str = "pretrained"
    """`pretrained` (timm's source, or the installed package), the path of a .safetensors or .pth file, or `random`
    (only for studies and tests)."""
    weight: float = Field(default=1.0, gt=0)
    """Share in the feature losses, relative to the other teachers' weights."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the teacher's arithmetic. auto: bf16 on a GPU that computes it, else fp32."""
    compile: bool = False
    """Run it through torch.compile, which takes a minute once and needs a C++ compiler (on a GPU: Triton)."""


def _one_teacher(given: object) -> object:
    """A single mapping stands for a list of one teacher, `0` in it for that one: `--set model.teacher.0.name=…`."""
    if isinstance(given, dict) and isinstance(given.get("0"), dict):
        given = {key: value for key, value in given.items() if key != "0"} | given["0"]
    return [given] if isinstance(given, (dict, TeacherConfig)) else given


class StudentConfig(_Section):
    name: str | None = None
    """timm encoder, or `light` (0.9 M parameters, trained from scratch); None: the first teacher's architecture,
    starting from its weights."""
    weights: str = "pretrained"
    """As for the teacher; of no use where the student starts from the teacher's weights, or is `light`."""
    batch_norm: Literal["frozen", "batch"] = "frozen"
    """frozen: BatchNorm stays on its stored statistics, so that a run does not depend on how it is split over ranks."""
    frozen_levels: int = Field(default=0, ge=0)
    """Shallow levels of the encoder that keep their weights, which spares their backward pass."""
    fusion: Literal["cross_level", "same_level"] = "cross_level"
    """cross_level: deeper student levels take part in predicting each shallower one; same_level: every level is
    predicted from its own alone (a study's baseline)."""
    width: int = Field(default=64, ge=8)
    """Middle width of the cross-level fusion."""
    residual: bool | None = None
    """Predict corrections to the student's own features; None: where its channels are the first teacher's."""


class SpeConfig(_Section):
    dim: int = Field(default=64, ge=4)
    """Channels D of the aggregated prior."""
    groups: int = Field(default=4, ge=1)
    """Groups G that choose among the levels on their own; divides `dim`."""
    heads: int = Field(default=4, ge=1)
    """Heads of the semantic attention; divides the channels of every embed point."""
    points: list[str] | None = None
    """Names of the backbone's embed points to use; None: all that it declares."""
    levels: list[Annotated[int, Field(ge=1, le=5)]] | None = Field(default=None, min_length=1)
    """Levels of the prior that the embeddings read, from 1, such as [3, 4]: strides 16 and 32; None: all."""


class ModelConfig(_Section):
    backbone: dict = Field(default_factory=lambda: {"name": "unet"})
    """`name` of a backbone or a preset of one (`nafnet-32`); every other key goes to its constructor, and before the
    preset's."""
    backbone_from: str | None = None
    """Run, checkpoint or exported model whose backbone, and gate, this one starts from; `backbone` and `gate` are then
    that one's, where they are not given. `shipped`: the model that comes with the program."""
    prior: bool = True
    """False trains the plain backbone: no teacher, no student, no SPE."""
    prior_from: str | None = None
    """Run, checkpoint, exported model or exported prior (`sharpprior export --prior`) whose prior network is taken over
    whole: student, fusion, statistics. `levels`, `teacher` and `student` are then that run's, where they are not given;
    it is frozen (train.student_frozen) and needs no teacher."""
    levels: int = Field(default=4, ge=1, le=5)
    """Levels L of the prior; level l has stride 4·2^(l-1)."""
    teacher: Annotated[list[TeacherConfig], BeforeValidator(_one_teacher), Field(min_length=1)] = Field(
        default_factory=lambda: [TeacherConfig()]
    )
    """One teacher, or a list of several, whose features are put side by side."""
    student: StudentConfig = StudentConfig()
    spe: SpeConfig = SpeConfig()
    gate: bool = False
    """Scale the network's correction pixel by pixel, by what a small network sees in the blurry image, the correction
    and the prior: a sharp image needs none (`loss.extent` teaches it how blurry an image is). The network itself then
    learns from what is blurred alone, and changes sharp images where its gate is taken off."""
    oracle: bool = False
    """For studies: the embeddings read the teacher's features of the SHARP image in place of the prior, in training and
    in evaluations. An upper bound that no photograph has: such a model cannot restore."""

    @model_validator(mode="after")
    def _named(self) -> ModelConfig:
        if not isinstance(self.backbone.get("name"), str):
            raise ValueError("backbone needs a name, such as {name: unet}")
        if self.prior_from is not None and not self.prior:
            raise ValueError("prior_from takes a prior over, but prior is false: set one of them")
        if self.spe.dim % self.spe.groups:
            raise ValueError(f"spe.groups {self.spe.groups} does not divide spe.dim {self.spe.dim}")
        if self.spe.levels is not None and max(self.spe.levels) > self.levels:
            raise ValueError(f"spe.levels {self.spe.levels}: the prior has {self.levels} levels")
        if self.spe.levels is not None and sorted(set(self.spe.levels)) != self.spe.levels:
            raise ValueError(f"spe.levels {self.spe.levels}: name each level once, in rising order")
        if self.oracle and not self.prior:
            raise ValueError("oracle gives the embeddings a teacher's features, but prior is false: set one of them")
        if self.student.frozen_levels > self.levels:
            raise ValueError(f"student.frozen_levels {self.student.frozen_levels} exceeds the {self.levels} levels")
        given = self.student.weights
        if self.student.name == "light" and given not in ("pretrained", "random"):
            raise ValueError(
                f"light has no weights to read (given: {given}): it starts from the seed; leave weights out"
            )
        return self

    @property
    def teacher_names(self) -> str:
        """The teachers' names, for a reader."""
        return " + ".join(each.name for each in self.teacher)
