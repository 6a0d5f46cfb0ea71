"""A prior or a backbone taken over from another run: its settings, its weights, and where they are from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.deblurrer import Deblurrer
from model.encoder import weights_digest
from model.gate import CorrectionGate
from model.pretrained import CONFIG, load_config, load_state, load_strictly
from train.checkpoint.saved import is_shipped, model_folder
from train.config.file import build_config
from train.config.file import load_config as load_run_config
from train.config.schema import Config
from train.log import log

PARTS = ("backbone", "prior")
SHAPING = ("name", "fusion", "width", "residual")  # settings of a student that decide its tensors and what they mean


def with_plugged(config: Config, *, resumed: bool = False, asked: Sequence[str] | None = None) -> Config:
    """The configuration with the settings of what it takes over from other runs (`model.backbone_from`,
    `model.prior_from`) filled in where it does not give its own, and their paths absolute.

    resumed: a run goes on, so that its own folder says them, whatever became of those other runs. asked: the keys
    that were set by hand (`--set`); a prior's settings that only a file gives give way to the prior's own, which is
    said. None: all count as set by hand. ValueError where such a setting differs, or there is no such model.
    """
    sources = {part: getattr(config.model, f"{part}_from") for part in PARTS}
    sources = {part: _place(path) for part, path in sources.items() if path is not None}
    if not sources:
        return config
    own = config.run.folder / CONFIG
    before = load_run_config(own).model if resumed and own.is_file() else None
    values = config.model_dump(mode="json")
    for part, path in sources.items():
        same = before is not None and getattr(before, f"{part}_from") == path
        theirs = before if same else _saved_config(model_folder(path)).model
        taken = (
            _prior_settings(config.model, theirs, path, asked) if part == "prior" else _backbone(config.model, theirs)
        )
        values["model"] |= {f"{part}_from": path, **taken}
    return build_config(values)


def plug_in(network: Deblurrer, config: Config) -> dict[str, dict[str, str]]:
    """Copy the weights that the configuration takes over into a network; every other weight stays. Returns, by part,
    where they are `from` and their `digest` (`model.encoder.weights_digest`).

    ValueError where a file is damaged, has no such part, or one that does not fit: names, shapes, values that are not
    finite, a prior whose scales were never measured.
    """
    origins = {}
    for part in PARTS:
        source = getattr(config.model, f"{part}_from")
        if source is None:
            continue
        folder, module = model_folder(source), getattr(network, part)
        state = part_state(folder, part)
        mine, theirs = (
            {"backbone": c.model.backbone, "prior": _shape(c.model)} for c in (config, _saved_config(folder))
        )
        advice = f" (its {part}: {theirs[part]}; this one: {mine[part]})"
        load_strictly(module, state, f"{folder}: its {part} does not fit this model", advice)
        if part == "prior" and not module.statistics.calibrated:
            raise ValueError(f"{folder}: its prior was never calibrated: take that of a run that has trained")
        if part == "backbone" and network.gate is not None and _saved_config(folder).model.gate:
            prior = config.model.prior_from
            _take_gate(network.gate, folder, with_prior=prior is not None and model_folder(prior) == folder)
        origins[part] = {"from": str(folder), "digest": weights_digest(module)}
    return origins


def _take_gate(gate: CorrectionGate, folder: Path, *, with_prior: bool) -> None:
    """The gate goes with the network whose corrections it judges. What reads a prior is this model's own, and of no
    effect at first; one that has learned to read that model's prior stays behind where the prior does. ValueError."""
    state = part_state(folder, "gate")
    if any(name.startswith("join.") for name in state) and not with_prior:
        log.info("the gate of %s reads its prior, which is not taken over: this one begins anew", folder)
        return
    own = {name: value for name, value in gate.state_dict().items() if name.startswith("join.")}
    load_strictly(gate, own | state, f"{folder}: its gate does not fit this model", "")


def part_state(folder: Path, part: str) -> dict[str, torch.Tensor]:
    """The tensors of a saved model's backbone or prior, under their names in it. ValueError where there are none, or
    a value is not finite."""
    state = {
        name.removeprefix(f"{part}."): value
        for name, value in load_state(folder).items()
        if name.startswith(f"{part}.")
    }
    if not state:
        raise ValueError(f"{folder}: holds no {part}: name a run, a checkpoint or an exported model that has one")
    bad = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise ValueError(f"{folder}: its {part} cannot be used: values of {bad[0]} are not finite")
    return state


def _place(path: str) -> str:
    """A path that means the same from any folder; the name of the shipped model stays one, for other machines."""
    if is_shipped(path):
        return path
    return str(Path(path).expanduser().absolute())


def _saved_config(folder: Path) -> Config:
    return build_config(load_config(folder), {(): str(folder / CONFIG if folder.is_dir() else folder)})


def _backbone(mine: ModelConfig, theirs: ModelConfig) -> dict[str, Any]:
    """`backbone` and `gate`, where this model does not give them itself."""
    return {key: getattr(theirs, key) for key in ("backbone", "gate") if key not in mine.model_fields_set}


def _prior_settings(mine: ModelConfig, theirs: ModelConfig, path: str, asked: Sequence[str] | None) -> dict[str, Any]:
    """`levels`, `teacher` and `student` of a prior, for a model that may give some of them itself."""
    if not theirs.prior:
        raise ValueError(f"model.prior_from {path}: that run has no prior (its model.prior is false)")
    given, given_student = mine.model_fields_set, mine.student.model_fields_set
    wanted = _shape(theirs)
    shapes = _shape(mine if "teacher" in given else mine.model_copy(update={"teacher": theirs.teacher}))
    told = {"levels": "levels" in given, "teacher": "teacher" in given}
    told |= {f"student.{key}": "student" in given and key in given_student for key in SHAPING}
    by_hand = {key for key in told if asked is None or any(f"model.{key}.".startswith(f"{a}.") for a in asked)}
    for key in (key for key, is_given in told.items() if is_given and shapes[key] != wanted[key]):
        if key in by_hand:
            raise ValueError(
                f"model.prior_from {path}: its prior has {key} {wanted[key]}, and model.{key} is {shapes[key]} here: "
                "leave that out, or set it to the same"
            )
        log.info("model.%s %s of the configuration gives way to the prior's %s", key, shapes[key], wanted[key])
    given = given - ({"teacher"} - by_hand)
    given_student = given_student - {key for key in SHAPING if f"student.{key}" not in by_hand}
    taken: dict[str, Any] = {"levels": theirs.levels}
    if "teacher" not in given:
        taken["teacher"] = [each.model_dump(mode="json") for each in theirs.teacher]
    own = mine.student.model_dump(mode="json", include=given_student) if "student" in given else {}
    taken["student"] = theirs.student.model_dump(mode="json") | own
    return taken


def _shape(model: ModelConfig) -> dict[str, Any]:
    """What of the settings decides a prior's tensors, and whose features they predict."""
    student = model.student.model_dump(include=set(SHAPING)) | {"name": model.student.name or model.teacher[0].name}
    return {"levels": model.levels, "teacher": model.teacher_names} | {f"student.{k}": v for k, v in student.items()}
