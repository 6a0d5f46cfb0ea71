"""Evaluate what training saved on pairs that somebody else chose: picture by picture, over ranks, after any stop."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from data.errors import DataError
from data.files import replacing
from model.pretrained import WEIGHTS
from model.summary import summarize
from train.checkpoint.saved import describe, load_model, loss_state, refuse_oracle
from train.config.identity import git_commit, versions
from train.config.schema import Config
from train.engine.precision import keep_depthwise_in_fp32, with_precision
from train.evaluate.baselines import Baselines
from train.evaluate.book import Book
from train.evaluate.chosen import yardsticks_of
from train.evaluate.measure import RESTORED, Measuring
from train.evaluate.metrics import as_picture, metric_names
from train.evaluate.pairs import Item, Pair, PairSet
from train.evaluate.perceptual import CLASSIFIER
from train.evaluate.realblur import Aligned, AlignPool
from train.evaluate.results import build, metric_facts, seal, write_tables
from train.evaluate.scores import INPUT
from train.evaluate.showing import chosen_to_show, shown_pictures, write_markdown, write_page, write_panel
from train.evaluate.summary import ALIGNED
from train.evaluate.yardsticks import FORMAT
from train.log import log
from train.objective.task import DeblurTask
from train.restore.names import find_model
from train.restore.tiles import default_tile

ALIGNED_A_PICTURE = 4  # input, restored, two yardsticks
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """How pictures are restored and what is kept. tile: side in px, whole, or auto (whole where memory allows);
    precision: fp32 or bf16, None as the model was trained. also: metrics beside those that are always measured.
    deconvolution: of crops, whose kernels are known, also what is told them. baselines: file of what is known of inputs
    and yardsticks, added to. save: keep every restored picture as a PNG. rank, world: of the processes that share the
    pictures."""

    tile: int | Literal["auto", "whole"] = "auto"
    precision: str | None = None
    also: tuple[str, ...] = ()
    deconvolution: bool = True
    baselines: Path | None = None
    save: bool = False
    workers: int = 1
    rank: int = 0
    world: int = 1


@dataclass
class Tested:
    """A model ready to be tested: network, configuration, where it came from, and what identifies it."""

    network: torch.nn.Module
    config: Config
    source: Path
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str | Path, which: str, device: torch.device) -> Tested:
        """Load a model by its name (`find_model`). ValueError where there is none."""
        network, config, source = load_model(find_model(name), device, which)
        return cls(network, config, source, _model_facts(network, config, source))

    @property
    def name(self) -> str:
        """Short, for titles: the run's name and the step, or the file's name."""
        return str(self.facts["name"])


class Evaluating:
    """One process's part of an evaluation: opened, then `run`; `finish` writes the results where all parts are done.

    folder: where measurements are kept. ValueError where it holds those of something else.
    """

    def __init__(
        self, model: Tested, pairs: PairSet, folder: Path, device: torch.device, how: Settings, *, overwrite: bool
    ) -> None:
        precision = how.precision or ("bf16" if model.config.engine.precision == "bf16" else "fp32")
        if precision not in PRECISIONS:
            raise ValueError(f"--precision {precision}: one of {', '.join(PRECISIONS)}")
        names = metric_names("full", how.also)
        state = loss_state(model.source) if pairs.whole and model.config.model.prior else None
        if state is None:  # without a teacher it would restore blind, by a prior that was never trained
            what = "evaluate its run or checkpoint on validation crops, whose sharp pictures its teacher sees"
            refuse_oracle(model.config.model.oracle, model.source, what)
        self.model, self.pairs, self.folder, self._how = model, pairs, folder, how
        self.settings = {
            "tile": "whole" if pairs.whole else how.tile,
            "precision": precision,
            "metrics": list(names),
            "alignment": "RealBlur (ECC homography)" if pairs.aligned else "none",
        }
        told = pairs.whole and how.deconvolution
        if pairs.whole and not told:
            self.settings["deconvolution"] = "left out"
        taught = {each.name for each in model.config.model.teacher} | {model.config.model.student.name}
        if "classes" in names and model.config.model.prior and CLASSIFIER in taught:
            self.settings["classes"] = f"by {CLASSIFIER}, which taught this model: no independent judge"
            log.warning("classes: %s taught this model: it is no independent judge of it", CLASSIFIER)
        computing = {name: number for name, number in versions().items() if name in ("torch", "timm", "numpy")}
        self.versions = {"sharpprior": git_commit() or "not in git", "yardsticks": FORMAT, **computing}
        tested = {name: pairs.facts[name] for name in ("layout", "split", "blur variant", "pairs", "of")}
        identity = {"model": model.facts["digest"], "data": tested | {"digest": pairs.digest}}
        identity |= {"settings": self.settings, "versions": self.versions}
        self.book = Book(
            folder, identity, pairs.items, rank=how.rank, world=how.world, overwrite=overwrite, content=pairs.content
        )
        keep_depthwise_in_fp32(model.network, with_precision(model.config, precision).engine, device)
        task = None
        if state is not None:
            task = DeblurTask(model.config, device)
            task.load_state_dict(state)
        auto, tile = how.tile == "auto" and not pairs.whole, default_tile(model.config)
        side = tile if auto else how.tile if isinstance(how.tile, int) else None
        # Only crops have kernels that are known; asked after the book, which refuses folders of something else.
        yardsticks, said = yardsticks_of(model.config, model.source, folder, device, deconvolution=told)
        self.settings |= {"yardsticks": said}
        self.measuring = Measuring(
            model.network,
            device,
            names=names,
            tile=side,
            auto=auto,
            precision=PRECISIONS[precision],
            yardsticks=yardsticks,
            task=task,
            baselines=None if how.baselines is None else Baselines(how.baselines, device),
        )
        self.device = device

    def todo(self) -> list[Item]:
        """What is left of this process's share; with `save` also pictures that were measured before and not kept."""
        left = {item.key for item in self.book.share(self._how.world)}
        mine = self.pairs.items[self._how.rank :: self._how.world]
        return [each for each in mine if each.key in left or (self._how.save and not self._kept(each).exists())]

    def run(self, on_picture: Callable[[Item, str | None], None] = lambda item, why: None) -> int:
        """Restore and measure what is left of the share, each picture's record on the disk before `on_picture(item, why
        it failed)` is told. Returns how many were done. One that does not read, or that no metric takes, is recorded
        as failed, and the rest go on.
        """
        todo = self.todo()
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(AlignPool(self._how.workers)) if self.pairs.aligned and todo else None
            # While pictures are aligned in other processes, the next ones are restored here: a kill loses these too.
            ahead = 0 if pool is None else max(1, self._how.workers // ALIGNED_A_PICTURE)
            waiting: deque[tuple[Item, dict[str, Any], dict[str, Future[Aligned]]]] = deque()

            def write() -> None:
                item, record, futures = waiting.popleft()
                try:
                    record = with_aligned(record, {name: each.result() for name, each in futures.items()})
                except ValueError as error:
                    record = _failed(item, error)
                self.book.add(item, record)
                on_picture(item, record.get("failed"))

            for item in todo:
                waiting.append(self._picture(item, pool))
                while len(waiting) > ahead:
                    write()
            while waiting:
                write()
        self.book.close()
        return len(todo)

    def _picture(self, item: Item, pool: AlignPool | None) -> tuple[Item, dict[str, Any], dict[str, Future[Aligned]]]:
        """(item, record, alignments under way by name of the picture)."""
        try:
            pair = self.pairs.read(item)
            record, pictures = self.measuring.picture(pair, item.tier, crop=self.pairs.whole)
            record |= {"content": pair.content} if pair.content else {}
        except ValueError as error:  # one that no metric takes, as of 8 px, must not end the others
            return item, _failed(item, error), {}
        if self._how.save:
            self._keep(item, pictures[RESTORED])
        if pool is None:
            return item, record, {}
        sharp = as_picture(pair.sharp)
        return item, record, {name: pool.submit(sharp, as_picture(image)) for name, image in pictures.items()}

    def restored(self, pair: Pair) -> Tensor:
        """A pair's restored picture, uint8 [3, H, W]."""
        return self.measuring.crop(pair)[0] if self.pairs.whole else self.measuring.restore(pair.blurry)[0]

    def _kept(self, item: Item) -> Path:
        return self.folder / "restored" / f"{item.key.replace('/', '-')}.png"

    def _keep(self, item: Item, restored: Tensor) -> None:
        file = self._kept(item)
        file.parent.mkdir(exist_ok=True)
        with replacing(file, durable=False) as path:
            Image.fromarray(as_picture(restored)).save(path, format="PNG")


def _failed(item: Item, error: ValueError) -> dict[str, Any]:
    """Why a picture has no numbers; errors of data name their file."""
    return {"failed": str(error) if isinstance(error, DataError) else f"{item.key}: {error}"}


def _model_facts(network: torch.nn.Module, config: Config, source: Path) -> dict[str, Any]:
    """What a table of results says of a model, and the digest of its weights."""
    counts = summarize(network)
    step = describe(source)
    run = next((path.parent.name for path in source.parents if path.name == "checkpoints"), None)
    trained = config.data.train
    backbone = config.model.backbone
    return {
        "name": f"{run}, {step}" if run else source.stem,
        "path": str(source),
        "step": int(step.removeprefix("step ")) if step.startswith("step ") else None,
        "digest": _file_digest(source if source.is_file() else source / WEIGHTS),
        "backbone": str(backbone.get("name", backbone)) if isinstance(backbone, dict) else str(backbone),
        "prior": config.model.prior,
        "oracle": config.model.oracle,
        "parameters": counts.parameters,
        "macs at 256×256": counts.macs,
        "training data": [each.path for each in trained] if trained else "not recorded with the model",
        "training blur": config.blur.preset if trained else "not recorded with the model",
        "training crop": config.data.crop if trained else None,
        "training steps": config.train.steps if trained else None,
    }


def _file_digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()[:32]


def machine(device: torch.device) -> str:
    """The device by name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def with_aligned(record: dict[str, Any], found: Mapping[str, Aligned]) -> dict[str, Any]:
    """A picture's record with its values after RealBlur's alignment first, and which pictures were not aligned."""
    if not found:
        return record

    def both(name: str, values: Mapping[str, float]) -> dict[str, float]:
        return {"psnr" + ALIGNED: found[name].psnr, "ssim" + ALIGNED: found[name].ssim, **values}

    made = {name: both(name, values) for name, values in record["yardsticks"].items()}
    lost = [name for name, each in found.items() if not each.found]
    columns = {name: both(name, record[name]) for name in (INPUT, RESTORED)}
    return record | columns | {"yardsticks": made} | ({"not aligned": lost} if lost else {})


def finish(evaluation: Evaluating) -> dict[str, Any] | None:
    """results.json and the reports beside it, where every picture of the list is done; None where other processes still
    work, or ended early. Whoever ends last writes them."""
    records = evaluation.book.records()
    if len(records) < len(evaluation.pairs.items):
        return None
    model, pairs, folder = evaluation.model, evaluation.pairs, evaluation.folder
    facts = {
        "model": model.facts,
        "data": {**pairs.facts, "label": pairs.label, "digest": pairs.digest},
        "settings": evaluation.settings,
        "versions": evaluation.versions,
        "device": machine(evaluation.device),
    }
    metrics = metric_facts(evaluation.settings["metrics"], aligned=pairs.aligned)
    results = build(records, metrics, facts)
    shown = shown_pictures(
        [key for keys in chosen_to_show(results) for key in keys], _by_key(results), pairs, evaluation.restored
    )
    title = f"{model.name} on {pairs.facts['set']}"
    panel = [shown[key] for key in chosen_to_show(results)[2] if key in shown]
    write_tables(folder, results)
    if panel:
        write_panel(folder / "panel.png", panel, results["headline"]["metric"])
    write_markdown(folder / "report.md", results, title=title, panel=bool(panel))
    write_page(folder / "report.html", results, shown, title=title)
    seal(folder, results)
    return results


def _by_key(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {picture["key"]: picture for picture in results["pictures"]}
