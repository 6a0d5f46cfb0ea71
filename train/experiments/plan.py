"""An experiment as a file: the arms that are compared, what they share, and the runs that this makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.names import choose
from train import ROOT
from train.checkpoint.plug import with_plugged
from train.config.file import load_config
from train.config.schema import Config
from train.evaluate.metrics import METRICS

FOLDER = ROOT / "configs" / "experiments"


class Arm(BaseModel):
    """One way that is compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    says: str = ""
    """What it is, for the report."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys of the configuration (`model.prior`) that differ from what all arms share."""
    prior: str | None = None
    """Name of a run of `first` whose distilled prior it takes."""


class Experiment(BaseModel):
    """The file: a configuration, the changes that all runs share, arms, seeds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    about: str = ""
    """Paragraphs for the head of the report."""
    config: str
    """YAML file of the configuration, relative to this file's folder."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys that differ from it in all runs."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    first: dict[str, Arm] = Field(default_factory=dict)
    """Runs that are made once, before the arms, such as a prior that several arms take."""
    arms: dict[str, Arm] = Field(min_length=1)
    also: list[str] = []
    """Metrics beside those that `sharpprior evaluate` always measures."""
    reference: str | None = None
    """The arm that the others are compared with; None: the first."""
    oracle: str | None = None
    """The arm that is an upper bound: the report says which share of its gain the others reach."""

    @model_validator(mode="after")
    def _named(self) -> Experiment:
        for what, name in (("reference", self.reference), ("oracle", self.oracle)):
            if name is not None and name not in self.arms:
                raise ValueError(f"{what} {name}: no such arm; there are {', '.join(self.arms)}")
        for name, arm in (*self.first.items(), *self.arms.items()):
            if arm.prior is not None and (arm.prior not in self.first or name in self.first):
                raise ValueError(f"{name}: prior {arm.prior} is no run of `first`: {', '.join(self.first) or 'none'}")
        if shared := set(self.first) & set(self.arms):
            raise ValueError(f"{', '.join(sorted(shared))}: both in `first` and an arm")
        return self

    @property
    def compared_with(self) -> str:
        """Name of the reference arm."""
        return self.reference or next(iter(self.arms))


@dataclass(frozen=True)
class Trial:
    """One run: an arm (or one of `first`, whose seed is the first one) with a seed. settings: `key=value` overrides."""

    arm: str
    seed: int
    config: str
    settings: tuple[str, ...]
    needs: str | None = None
    also: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the run."""
        return f"{self.arm}-seed{self.seed}"

    def load(self) -> Config:
        """The whole configuration, with what it takes over from a run that is there. ValueError where it contradicts
        itself, or where steps would not cost the same in two runs of it."""
        config = load_config(self.config, self.settings)
        if config.engine.precision == "auto":
            raise ValueError(f"{self.name}: engine.precision auto may choose otherwise in each run: set fp32 or bf16")
        return with_plugged(config, asked=[setting.partition("=")[0] for setting in self.settings])


def load_experiment(name: str) -> tuple[str, Experiment]:
    """(name, experiment) of a name below configs/experiments, or of a file. ValueError naming the file and what is
    wrong."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        known = ", ".join(sorted(each.stem for each in FOLDER.glob("*.yaml"))) or "none"
        raise ValueError(f"{path}: {error.strerror or error}; experiments here: {known}") from None
    try:
        experiment = Experiment.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ValueError(f"{path}: unknown key {place}") from None
        raise ValueError(
            f"{path}: {place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from None
    for metric in experiment.also:
        try:
            choose("metric", metric, METRICS)
        except ValueError as error:
            raise ValueError(f"{path}: also: {error}") from None
    config = path.parent / experiment.config
    if not config.is_file():
        raise ValueError(f"{path}: config {experiment.config}: no such file")
    return path.stem, experiment.model_copy(update={"config": str(config.resolve())})


def trials(
    experiment: Experiment, root: Path, *, data: Mapping[str, str] = {}, overrides: Sequence[str] = ()
) -> Iterator[Trial]:
    """All runs in the order in which they are made: `first`, then seed by seed every arm, so that an experiment that is
    broken off has compared all arms as far as it got.

    root: folder of the runs. data: `train` and `val` shard sets in place of the configuration's. overrides: further
    `key=value` for all runs, after those of the file.
    """
    config = experiment.config
    shared = [f"{key}={_plain(value)}" for key, value in experiment.set.items()]
    shared += [f"data.{part}={path}" for part, path in data.items()]

    def made(name: str, arm: Arm, seed: int) -> Trial:
        own = [f"{key}={_plain(value)}" for key, value in arm.set.items()]
        if arm.prior is not None:
            source = root / f"{arm.prior}-seed{experiment.seeds[0]}"
            own = ["model.prior=true", f"model.prior_from={source}", "train.distill_steps=0", *own]
        place = [f"run.root={root}", f"run.name={name}-seed{seed}", f"run.seed={seed}"]
        needs = f"{arm.prior}-seed{experiment.seeds[0]}" if arm.prior else None
        return Trial(name, seed, config, (*shared, *own, *overrides, *place), needs, tuple(experiment.also))

    for name, arm in experiment.first.items():
        yield made(name, arm, experiment.seeds[0])
    for seed in experiment.seeds:
        for name, arm in experiment.arms.items():
            yield made(name, arm, seed)


def _plain(value: Any) -> str:
    """As `--set` reads it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("\n...").strip()
