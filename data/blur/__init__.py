"""Blur synthesis: blurry and sharp pairs from sharp photographs, in linear light, the same for any worker count.

`synthesize_pair` makes one on the CPU; `plan_pair` (in a worker) and `data.blur.batched.pairs_of_plans` make the same
pairs in batches on a GPU; `data.blur.frames.average_window` makes them from video.
"""

from data.blur.attempt import Attempt, PairPlan, draw_attempt, plan_pair
from data.blur.config import BlurConfig
from data.blur.pair import BlurPair, pair_of_plan, synthesize_pair
from data.blur.rng import sample_rng
from data.blur.severity import TIERS, severity_of

__all__ = [
    "TIERS",
    "Attempt",
    "BlurConfig",
    "BlurPair",
    "PairPlan",
    "draw_attempt",
    "pair_of_plan",
    "plan_pair",
    "sample_rng",
    "severity_of",
    "synthesize_pair",
]
