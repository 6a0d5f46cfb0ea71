"""What people hold pictures in (NumPy, Pillow, torch) as RGB tensors, and back to what they came in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.restore.tiles import TOPS

Back = Callable[[Tensor], Any]
PLAIN = ("L", "LA", "RGB", "RGBA", "I;16")
SLACK = 1e-3  # how far floats may lie outside of [0, 1]: resampling overshoots, 0…255 does not pass for it


def unpacked(image: Any) -> tuple[Tensor, Back]:
    """(RGB pixels [3, H, W] or [B, 3, H, W] on the CPU or the tensor's device, the way back) of a picture.

    NumPy: [H, W], [H, W, 1 to 4] or a batch [B, H, W, 1 to 4] of uint8, uint16, or floats in [0, 1]. Pillow: any mode
    of 8 bits, or 16-bit grey; palettes and inks come back as RGB. torch: [1 to 4, H, W] or [B, 1 to 4, H, W]. Grey is
    repeated, and comes back grey; a last channel of 2 or 4 is alpha, which comes back as it was. ValueError, saying
    what is expected, for anything else.
    """
    if isinstance(image, Image.Image):
        return _of_pillow(image)
    if isinstance(image, np.ndarray):
        return _of_numpy(image)
    if isinstance(image, Tensor):
        return _of_tensor(image)
    raise ValueError(f"a {type(image).__name__} is no picture: give a NumPy array, a Pillow image or a torch tensor")


def _of_tensor(image: Tensor) -> tuple[Tensor, Back]:
    if image.ndim not in (3, 4) or not 1 <= image.shape[-3] <= 4 or image.numel() == 0:
        raise ValueError(f"a tensor {list(image.shape)}: give [3, H, W] or [B, 3, H, W] (or 1, 2, 4 channels)")
    if image.dtype not in TOPS and not image.is_floating_point():
        raise ValueError(f"a tensor of {image.dtype}: give uint8, uint16, or floats in [0, 1]")
    if image.is_floating_point():
        low, high = (float(value) for value in image.aminmax())
        if not (low >= -SLACK and high <= 1 + SLACK):  # NaN too
            raise ValueError(f"floats from {low:.4g} to {high:.4g}: give values in [0, 1]")
    channels = image.shape[-3]
    colour, alpha = (image[..., :-1, :, :], image[..., -1:, :, :]) if channels in (2, 4) else (image, None)
    grey = colour.shape[-3] == 1

    def back(restored: Tensor) -> Tensor:
        if grey:
            mean = restored.float().mean(-3, keepdim=True)
            restored = mean.round().to(restored.dtype) if restored.dtype in TOPS else mean
        restored = restored.to(image.device, image.dtype)
        return restored if alpha is None else torch.cat([restored, alpha], dim=-3)

    return colour.expand(*colour.shape[:-3], 3, *colour.shape[-2:]) if grey else colour, back


def _of_numpy(image: np.ndarray) -> tuple[Tensor, Back]:
    if image.dtype.newbyteorder("=") not in (np.uint8, np.uint16, np.float16, np.float32, np.float64):
        raise ValueError(f"an array of {image.dtype}: give uint8, uint16, or floats in [0, 1]")
    flat = image.ndim == 2
    if image.ndim not in (2, 3, 4) or not (flat or 1 <= image.shape[-1] <= 4):
        raise ValueError(f"an array {list(image.shape)}: give [H, W], [H, W, 3] or [B, H, W, 3] (or 1, 2, 4 channels)")
    array = np.moveaxis(image[..., None] if flat else image, -1, -3)
    usual = array.dtype.newbyteorder("=")  # torch knows no other order of bytes, nor negative strides
    pixels, tensor_back = _of_tensor(torch.from_numpy(np.ascontiguousarray(array, dtype=usual)))

    def back(restored: Tensor) -> np.ndarray:
        result = np.moveaxis(tensor_back(restored).numpy(), -3, -1)
        return np.ascontiguousarray(result[..., 0] if flat else result).astype(image.dtype, copy=False)

    return pixels, back


def _of_pillow(image: Image.Image) -> tuple[Tensor, Back]:
    if image.mode in ("I", "F") or (image.mode.startswith("I;16") and image.mode != "I;16"):
        raise ValueError(f"a Pillow image of mode {image.mode}: give 8 bits a channel, or I;16")
    if image.mode not in PLAIN or "transparency" in image.info:
        alpha = "transparency" in image.info or image.mode in ("PA", "La", "RGBa")
        grey = image.mode in ("1", "L", "La")
        image = image.convert(("L" if grey else "RGB") + "A" * alpha)
    pixels, array_back = _of_numpy(np.array(image))
    kept = {key: image.info[key] for key in ("icc_profile", "exif", "dpi") if key in image.info}

    def back(restored: Tensor) -> Image.Image:
        result = Image.fromarray(array_back(restored))
        result.info.update(kept)
        return result

    return pixels, back
