"""What a report says about its run beside the scores: what trained on what, for how long, on which machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from train.config.patches import pairs_before, phases
from train.config.schema import Config
from train.engine.engine import Engine
from train.engine.zero import trainable
from train.run.shares import mean_shares

MANY_PAIRS = 1_000_000


def run_facts(
    config: Config, engine: Engine, records: Sequence[Mapping[str, Any]], sources: Mapping[str, str], commit: str | None
) -> dict[str, str]:
    """Names and values of a report's table; records: of metrics.jsonl."""
    return {
        **sources,
        "model": f"{config.model.backbone['name']} with "
        + (
            f"the {'frozen ' if config.student_rests else ''}prior of {config.model.teacher_names}"
            if config.model.prior
            else "no prior"
        )
        + f", {trainable(engine.module):,} trained parameters",
        "steps": "; then ".join(
            f"{each.last - each.first} of {each.batch} pairs, {each.crop} px crops" for each in phases(config)
        )
        + (f"; the first {config.train.distill_steps} distill" if config.train.distill_steps else "")
        + (f"; {config.train.spe_steps} the embeddings alone" if config.train.spe_steps else ""),
        "seconds in steps": f"{_seconds(records):.0f}",
        "share of a step": "; ".join(f"{name} {share:.0%}" for name, share in mean_shares(records).items())
        + " (parts of the model: forward passes)"
        + _parts(records),
        "machine": f"{engine.world} ranks on {engine.device.type}, ZeRO {config.engine.zero}, "
        f"{config.engine.precision}",
        "blur": f"preset {config.blur.preset}; validation crops of {config.eval.crop} px",
        "commit": commit or "not in git",
    }


def run_notes(config: Config, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines below the scores of a run that saw few pairs."""
    pairs = pairs_before(config, config.train.steps)
    if pairs >= MANY_PAIRS:
        return []
    return [
        "",
        f"This run saw {pairs:,} pairs in {_seconds(records) / 60:.1f} minutes of training. So little buys a small "
        "gain, about a tenth of a dB; the networks of the literature see millions of crops, for days on GPUs.",
    ]


def _parts(records: Sequence[Mapping[str, Any]]) -> str:
    """What the forward pass of the last stage consists of, where the log says so."""
    told = [record["parts"] for record in records if "parts" in record][-1:]
    if not told:
        return ""
    return "; an eager forward pass: " + ", ".join(f"{name} {share:.0%}" for name, share in told[0].items())


def _seconds(records: Sequence[Mapping[str, Any]]) -> float:
    """Seconds in steps, from the log: exact where every step is logged, else scaled up from those that are."""
    timed = [(record["step"], record["seconds"]) for record in records if "seconds" in record]
    gaps = [timed[0][0], *(b - a for (a, _), (b, _) in pairwise(timed))] if timed else []
    return sum(seconds * gap for (_, seconds), gap in zip(timed, gaps, strict=True))
