"""Metrics of restored pictures, as the field reports them."""

from train.metrics.image import psnr, ssim, to_uint8
from train.metrics.interval import bootstrap_mean_interval

__all__ = ["bootstrap_mean_interval", "psnr", "ssim", "to_uint8"]
