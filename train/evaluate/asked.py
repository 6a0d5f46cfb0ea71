"""From what a user writes after --data to the pairs that it names, and to the folder where their numbers go."""

from __future__ import annotations

import re
from pathlib import Path

from data.errors import DataError
from data.prepare.layouts import LAYOUTS
from model.names import choose
from model.pretrained import SHIPPED, SHIPPED_NAME
from train.checkpoint.saved import RUNS
from train.config.schema import Config
from train.config.sources import data_sources, open_set
from train.evaluate.pairs import PairSet, RecordedPairs, ValidationPairs

RELEASED = tuple(name for name, layout in LAYOUTS.items() if name != "folder")  # photographs alone are no pairs
SYNTH = "synth"


def open_pairs(
    asked: str | None,
    config: Config,
    *,
    split: str | None = None,
    variant: str | None = None,
    partial: bool = False,
    folders: tuple[str, str] | None = None,
    pairs_list: Path | None = None,
    per_tier: int | None = None,
    crop: int | None = None,
    max_pairs: int | None = None,
) -> PairSet:
    """The pairs that `asked` names: LAYOUT:PATH of a data set as released, synth[:PATH] or a path or URL of a shard
    set, whose validation list it is; None or synth alone for the model's own validation set.

    split … pairs_list: of data sets; per_tier, crop: of shard sets, by default the model's. ValueError, naming the
    choice, for anything else.
    """
    of_sets = {"--split": split, "--variant": variant, "--partial": partial, "--blurry": folders, "--list": pairs_list}
    of_crops = {"--per-tier": per_tier, "--crop": crop}
    layout, found, path = (asked or SYNTH).partition(":")
    released = bool(found) and layout in RELEASED
    for name, given in (of_crops if released else of_sets).items():
        if given:
            what = "full pictures are restored of a data set as released" if released else "a shard set has crops alone"
            raise ValueError(f"{name}: {what}: leave it out")
    if released:
        if not path:
            raise ValueError(f"--data {asked}: name its folder too: {layout}:PATH")
        how = {"split": split, "variant": variant, "partial": partial, "folders": folders, "pairs_list": pairs_list}
        try:
            return RecordedPairs(layout, Path(path), max_pairs=max_pairs, **how)
        except DataError as error:
            raise DataError(re.sub(r"`sharpprior prepare (\S+) ", r"`--data \1:", str(error))) from None
    if asked is not None and asked in LAYOUTS:
        raise ValueError(f"--data {asked}: name its folder too: {asked}:PATH")
    if layout == "folder" and found:
        raise ValueError(
            "--data folder: photographs alone are no pairs: make a shard set of them with `sharpprior prepare`, and "
            "name it as synth:PATH"
        )
    if layout == SYNTH:
        named = path if found else None
        if found and not path:
            raise ValueError("--data synth:: name a shard set after the colon, or leave the colon out")
    else:
        named = asked
        if found and not path.startswith("//") and not Path(named).expanduser().exists():
            choose("data set", layout, [*RELEASED, SYNTH])
    return _validation(named, config, per_tier, crop, max_pairs)


def _validation(
    named: str | None, config: Config, per_tier: int | None, crop: int | None, max_pairs: int | None
) -> ValidationPairs:
    own = data_sources(config)[1]
    if named is None and own is None:
        raise ValueError("the model was trained without validation (eval: off): name a set with --data")
    shards = open_set(named or own.path, config)
    label = "validation" if named is None else f"synth-{Path(named.rstrip('/')).name}"
    return ValidationPairs(
        shards,
        config.blur,
        label=label,
        crop=crop or config.eval.crop,
        per_tier=per_tier or config.eval.per_tier,
        margin=config.data.margin,
        max_pairs=max_pairs,
    )


def default_folder(source: Path, pairs: PairSet, step: str) -> Path:
    """Where an evaluation goes that was given no folder: `evaluations/` in the run's folder, or beside an exported
    model (of the shipped one, which is the program's, in runs/), and in it a folder named after the pairs and the
    step."""
    name = re.sub(r"[^\w.-]+", "-", pairs.label)
    run = next((path.parent for path in source.parents if path.name == "checkpoints"), None)
    if run is not None:
        return run / "evaluations" / f"{name}-{step.replace(' ', '-')}"
    if source == SHIPPED:
        return RUNS / SHIPPED_NAME / "evaluations" / name
    return (source.with_name(f"{source.stem}-evaluations") if source.is_file() else source / "evaluations") / name
