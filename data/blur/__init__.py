"""Blur synthesis: blurry and sharp pairs from sharp photographs, in linear light, the same for any worker count."""

from data.blur.config import BlurConfig
from data.blur.pair import BlurPair, pair_from_seed, synthesize_pair
from data.blur.rng import sample_rng
from data.blur.severity import TIERS, psnr, severity_of

__all__ = ["TIERS", "BlurConfig", "BlurPair", "pair_from_seed", "psnr", "sample_rng", "severity_of", "synthesize_pair"]
