"""Scores of restored pairs, per severity tier, and the prior's similarity to the teacher."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch

from data.blur import TIERS
from data.shards.set import ShardSet
from train.evaluate.metrics import (
    METRICS,
    Metric,
    as_picture,
    bootstrap_mean_interval,
    measured,
    metric_names,
    to_uint8,
)
from train.evaluate.yardsticks import Yardsticks

VALIDATION_SEED = 0  # the validation list is the same for every training seed
PANEL_TIERS = ("severe", "extreme", "moderate")
SEVERE = ("severe", "extreme")
INTERVAL_LEVEL = 0.95
INPUT = "input"
TRIVIAL = (INPUT, "gaussian", "unsharp")  # what anyone can do without a model; the first wins where they are equal


@dataclass(frozen=True)
class Score:
    """One restored pair: the blurry input, the restored picture and what each yardstick makes of the input (by name),
    measured by the same metrics."""

    key: str
    tier: str
    extent: float
    input: dict[str, float]
    restored: dict[str, float]
    yardsticks: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """Restored minus input PSNR, dB."""
        return self.restored["psnr"] - self.input["psnr"]


@dataclass(frozen=True)
class TierSummary:
    """Means over the pairs of one tier; `low`, `high` bound the mean gain (95 %, bootstrap over samples).

    yardsticks: means of those that every pair of the tier has. trivial: the best of the input itself and the trivial
    yardsticks in this tier, by mean PSNR; over_trivial: the mean paired gain over it, dB, the headline; over_low,
    over_high bound it.
    """

    tier: str
    pairs: int
    samples: int
    gain: float
    low: float
    high: float
    input: dict[str, float]
    restored: dict[str, float]
    yardsticks: dict[str, dict[str, float]]
    trivial: str
    over_trivial: float
    over_low: float
    over_high: float

    def record(self) -> dict[str, Any]:
        """Plain values for metrics.jsonl: `input_` and `restored_` before the names of metrics."""
        facts = {"tier": self.tier, "pairs": self.pairs, "samples": self.samples}
        for name, value in self.input.items():
            facts |= {f"input_{name}": value, f"restored_{name}": self.restored[name]}
            if name == "psnr":
                facts |= {"gain": self.gain, "low": self.low, "high": self.high}
        over = {name: getattr(self, name) for name in ("trivial", "over_trivial", "over_low", "over_high")}
        return facts | over | {"yardsticks": self.yardsticks}


@dataclass
class Evaluation:
    """Scores of all pairs; per level, the mean cosine similarity to the teacher's features of the sharp picture of the
    prior, of the student's own features (empty where their channels differ), and, as a yardstick, of the untouched
    teacher's features of the blurry picture. All empty without a prior."""

    scores: list[Score] = field(default_factory=list)
    similarity: list[float] = field(default_factory=list)
    student_similarity: list[float] = field(default_factory=list)
    blurry_similarity: list[float] = field(default_factory=list)
    pictures: list[tuple[Score, np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)

    def tiers(self) -> list[TierSummary]:
        """A summary per tier that has pairs, from identity to extreme."""
        summaries = []
        others = sorted({score.tier for score in self.scores} - set(TIERS))
        for tier in (*TIERS, *others):
            rows = [score for score in self.scores if score.tier == tier]
            if rows:
                summaries.append(_summary(tier, rows))
        return summaries

    def metrics(self) -> dict[str, Metric]:
        """What the scores were measured by, in the table's order."""
        return {name: metric for name, metric in METRICS.items() if all(name in score.input for score in self.scores)}

    def severe_gain(self) -> float:
        """Mean gain over the severe and extreme pairs, dB: what the best checkpoint is chosen by."""
        gains = [score.gain for score in self.scores if score.tier in SEVERE]
        return float(np.mean(gains or [score.gain for score in self.scores]))

    def record(self) -> dict[str, Any]:
        """Plain values for metrics.jsonl."""
        return {
            "tiers": [summary.record() for summary in self.tiers()],
            "similarity": self.similarity,
            "student_similarity": self.student_similarity,
            "blurry_similarity": self.blurry_similarity,
        }


def _summary(tier: str, rows: Sequence[Score]) -> TierSummary:
    def mean(pictures: Sequence[dict[str, float]]) -> dict[str, float]:
        return {name: float(np.mean([each[name] for each in pictures])) for name in pictures[0]}

    def gain_over(pictures: Sequence[dict[str, float]]) -> tuple[float, float, float]:
        gains = [row.restored["psnr"] - each["psnr"] for row, each in zip(rows, pictures, strict=True)]
        return float(np.mean(gains)), *bootstrap_mean_interval(gains, keys, level=INTERVAL_LEVEL)

    keys, common = [row.key for row in rows], set.intersection(*(set(row.yardsticks) for row in rows))
    compared = {INPUT: [row.input for row in rows]}
    compared |= {name: [row.yardsticks[name] for row in rows] for name in rows[0].yardsticks if name in common}
    means = {name: mean(pictures) for name, pictures in compared.items()}
    trivial = max((name for name in means if name in TRIVIAL), key=lambda name: means[name]["psnr"])
    return TierSummary(
        tier,
        len(rows),
        len(set(keys)),
        *gain_over(compared[INPUT]),
        means.pop(INPUT),
        mean([row.restored for row in rows]),
        means,
        trivial,
        *gain_over(compared[trivial]),
    )


@torch.no_grad()
def evaluate_pairs(
    network: torch.nn.Module,
    pairs: Iterable[dict],
    *,
    device: torch.device,
    yardsticks: Yardsticks | None = None,
    teacher: torch.nn.Module | None = None,
    similarity: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor] | None = None,
    given: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] = lambda sharp: (),
    keep: Container[int] = (),
    at_once: int = 1,
    forwards: int = 0,
    dummy_size: int = 64,
    on_forward: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Restore and score pairs of one size as `data.stream.validation.validation_pairs` yields them.

    What does not depend on the network, the scores of the input and of `yardsticks`, is measured once a pair and kept
    in it under "known". teacher and similarity: measure the prior too. given: of the sharp pictures, what a study's
    oracle reads in place of a prior. keep: numbers of the pairs whose pictures stay
    in the result. at_once: pairs in a forward pass; the last pass is filled up, so that all have one shape.
    forwards: run the network at least this often, on black images of `dummy_size` after the pairs: under ZeRO-3 every
    rank must call it equally often. on_forward is called after each, and may end the evaluation by an exception. The
    network is left in the mode it came in.
    """
    was_training, names, passes = network.training, metric_names("every"), 0
    network.eval()
    result = Evaluation()
    sums: list[torch.Tensor] = []
    try:
        for batch in _batches(pairs, at_once):
            count, filled = len(batch), [*batch, *[batch[-1]] * (at_once - len(batch))]
            seen, truth = (torch.stack([pair[name] for pair in filled]).to(device) for name in ("blurry", "sharp"))
            out = network(seen.float().div(255), *given(truth.float().div(255)))
            restored = to_uint8(out.restored[-1])
            for pair in batch:
                if "known" not in pair:
                    pair["known"] = _known(pair, yardsticks, names, device)
            scores = measured(restored[:count], truth[:count], names)
            for place, (pair, score) in enumerate(zip(batch, scores, strict=True)):
                before, others = pair["known"]
                whole = Score(pair["key"], pair["tier"], float(pair["extent"]), before, score, others)
                result.scores.append(whole)
                if pair["number"] in keep:
                    images = (as_picture(each[place]) for each in (seen, restored, truth))
                    result.pictures.append((whole, *images))
            if teacher is not None and similarity is not None and out.prior is not None:
                blurry, sharp = (image[:count].float().div(255) for image in (seen, truth))
                of_network = [out.prior, *([out.student] if out.student is not None else [])]
                prior, *student = ([level[:count] for level in features] for features in of_network)
                target, seen_by = teacher(sharp), [prior, teacher(blurry), *student]
                sums.append(count * torch.stack([similarity(features, target) for features in seen_by]).double().cpu())
            passes += 1
            on_forward()
        for _ in range(passes, forwards):
            black = torch.zeros(at_once, 3, dummy_size, dummy_size, device=device)
            network(black, *given(black))
            on_forward()
    finally:
        network.train(was_training)
    if sums:
        means = (torch.stack(sums).sum(0) / len(result.scores)).tolist()
        result.similarity, result.blurry_similarity, result.student_similarity = [*means, []][:3]
    return result


def _batches(pairs: Iterable[dict], size: int) -> Iterator[list[dict]]:
    rest = iter(pairs)
    while batch := list(islice(rest, size)):
        yield batch


def _known(
    pair: dict, yardsticks: Yardsticks | None, names: Sequence[str], device: torch.device
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Scores of the input, and by name of what the yardsticks make of it."""
    known = {"input_psnr": float(pair["input_psnr"])} if "input_psnr" in pair else {}
    made = yardsticks.apply(pair["blurry"], pair["tier"], **known) if yardsticks is not None else {}
    images = torch.stack([pair["blurry"], *made.values()]).to(device)
    truth = pair["sharp"].to(device).expand(len(images), -1, -1, -1)
    before, *others = measured(images, truth, names)
    return before, dict(zip(made, others, strict=True))


def merge(parts: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of the ranks' parts; similarities are weighted by the number of pairs."""
    whole = Evaluation()
    for part in parts:
        whole.scores += part.scores
        whole.pictures += part.pictures
    measured = [part for part in parts if part.similarity]
    if measured:
        weights = np.array([len(part.scores) for part in measured], np.float64)
        for name in ("similarity", "student_similarity", "blurry_similarity"):
            values = np.array([getattr(part, name) for part in measured])
            setattr(whole, name, (weights @ values / weights.sum()).tolist())
    whole.scores.sort(key=_place)
    whole.pictures.sort(key=lambda picture: _place(picture[0]))
    return whole


def panel_numbers(rows: int, shards: ShardSet, crops: int) -> set[int]:
    """Places in the validation list of a panel's rows: spread over the photographs, chosen by position alone."""
    tiers = 1 if shards.kind == "pairs" else len(TIERS)
    numbers = set()
    for row in range(rows):
        tier = TIERS.index(PANEL_TIERS[row % len(PANEL_TIERS)]) if tiers > 1 else 0
        numbers.add((row * len(shards) // rows) * crops * tiers + tier)
    return numbers


def _place(score: Score) -> tuple[str, str, float]:
    return score.key, score.tier, score.extent
