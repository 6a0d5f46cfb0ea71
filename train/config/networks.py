"""The networks that a configuration names."""

from __future__ import annotations

from model.deblurrer import Deblurrer, build_deblurrer
from model.encoder import EncoderSpec
from model.teacher import Teacher
from model.teachers import Teachers
from train.config.schema import Config


def teacher_specs(config: Config) -> list[EncoderSpec]:
    """What the configuration's teachers are, in order; nothing is read."""
    return [EncoderSpec(each.name, each.weights, config.model.levels) for each in config.model.teacher]


def teacher_names(config: Config) -> str:
    """The teachers' names, for a reader."""
    return " + ".join(each.name for each in config.model.teacher)


def build_teachers(config: Config) -> Teachers:
    """The configuration's teachers with their weights, on the CPU. ValueError where weights are absent or unfit."""
    teachers = config.model.teacher
    return Teachers(
        [
            Teacher(each.name, each.weights, config.model.levels, precision=each.precision, compiled=each.compile)
            for each in teachers
        ],
        [each.weight for each in teachers],
    )


def build_model(config: Config, *, read_weights: bool = True) -> Deblurrer:
    """The module that a configuration describes; its fresh weights depend on the seed alone."""
    model = config.model
    return build_deblurrer(
        backbone=model.backbone,
        prior=model.prior,
        levels=model.levels,
        teachers=teacher_specs(config),
        student=model.student.name,
        student_weights=model.student.weights,
        student_batch_norm=model.student.batch_norm,
        student_frozen_levels=model.student.frozen_levels,
        fusion=model.student.fusion,
        fusion_width=model.student.width,
        residual_prior=model.student.residual,
        spe_dim=model.spe.dim,
        spe_groups=model.spe.groups,
        spe_heads=model.spe.heads,
        spe_points=model.spe.points,
        seed=config.run.seed,
        read_weights=read_weights,
    )
