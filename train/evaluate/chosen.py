"""The yardsticks that a saved model is held against: its run's, or those of its blur on the bundled photographs."""

from __future__ import annotations

from functools import cache
from itertools import islice
from pathlib import Path

import torch

from data.blur import BlurConfig
from data.shards.set import ShardSet
from train.config.file import configure
from train.config.schema import Config
from train.config.sources import BUNDLED
from train.evaluate.training_pairs import training_moments, training_pairs
from train.evaluate.yardsticks import OutdatedError, Yardsticks, choose, fit_deconvolution, known_kernel

FILE = "yardsticks.json"  # in a run's folder, and in an evaluation's
CROP = 256  # px of the bundled photographs, which are 512 px a side
KERNELS = 12  # training pairs that deconvolution's settings are chosen on: a second or two each on a CPU


def yardsticks_of(
    config: Config, source: Path, folder: Path, device: torch.device, *, deconvolution: bool
) -> tuple[Yardsticks, str]:
    """(yardsticks, on what they were chosen) for a model that was loaded from `source`.

    A run's own are taken from its folder; an exported model's are chosen on the bundled training photographs with the
    model's blur. deconvolution: with those that are told the kernel. Kept in `folder`, so that an evaluation that goes
    on has the same ones. A run's that an older version wrote are not taken: it is as an exported model then. ValueError
    for a damaged file.
    """
    run = next((path.parent for path in source.parents if path.name == "checkpoints"), None)
    found, said = None, f"bundled photographs, blur {config.blur.preset}"
    if run is not None and (run / FILE).is_file():
        try:
            found, said = Yardsticks.load(run / FILE), "training pairs of the run"
        except OutdatedError:
            said += " (the run's are of an older version)"
    if (folder / FILE).is_file():
        return Yardsticks.load(folder / FILE), said
    if found is None:
        found = _of_bundled(config.blur.model_dump_json())
    if deconvolution:
        known = (pair for pair in training_pairs(*_bundled(config.blur)) if known_kernel(pair) is not None)
        found = fit_deconvolution(found, islice(known, KERNELS), device)
    folder.mkdir(parents=True, exist_ok=True)
    found.save(folder / FILE)
    return found, said


def _bundled(blur: BlurConfig) -> tuple[Config, list[ShardSet]]:
    config = configure([f"data.crop={CROP}"]).model_copy(update={"blur": blur})
    return config, [ShardSet(BUNDLED / "train")]


@cache  # seconds, and the same for every model of this blur
def _of_bundled(blur: str) -> Yardsticks:
    return choose(training_moments(*_bundled(BlurConfig.model_validate_json(blur))))
