"""What a batch of the stream holds, and the ways in which pairs become one: in a worker, or on a GPU afterwards."""

from collections.abc import Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from data.blur import Attempt, BlurPair, PairPlan
from data.blur.batched import pairs_of_plans
from data.stream.crops import Crop
from data.stream.order import Slot


class Batch(TypedDict):
    """B pairs as `PairLoader` gives them. Tensors are on the CPU, blurry and sharp where they were made."""

    blurry: Tensor
    """uint8 [B, 3, S, S], sRGB."""
    sharp: Tensor
    """uint8 [B, 3, S, S], sRGB: the photographs' own pixels."""
    key: list[str]
    """Keys of the samples."""
    image: list[str]
    """Names of the sharp images by their content, for caches of what is computed from them."""
    box: Tensor
    """int64 [B, 3]: top, left, size of the crop in its photograph, px."""
    crop: Tensor
    """int64 [B]: number of the box in the photograph's plan."""
    flip: Tensor
    """bool [B]: mirrored left to right."""
    epoch: Tensor
    """int64 [B]: which pass over its source."""
    source: Tensor
    """int64 [B]: which of the stream's sets."""
    position: Tensor
    """int64 [B]: place in the endless order of samples."""
    tier: list[str]
    """Severity tiers, or "paired" for recorded pairs."""
    generator: list[str]
    """What made the blur, or "paired"."""
    seed: list[str]
    """Seeds of the blur, by which `data.blur.attempt.plan_pair` plans it again; "" for recorded pairs."""
    extent: Tensor
    """float32 [B]: extent of the blur, px; NaN for recorded pairs of which it is not known."""
    input_psnr: Tensor
    """float32 [B]: PSNR of blurry against sharp, dB."""
    samples_consumed: int
    """The state to save once the optimizer has used the batch: `start` of a stream that goes on after it."""
    features: NotRequired[Any]
    """What the loader's `attach` found of the crops, such as a `data.feature_cache.reader.Found`."""


class Waiting(NamedTuple):
    """A pair whose pixels are made later, with the first attempt at it, which a worker has drawn."""

    plan: PairPlan
    attempt: Attempt


class Planned(NamedTuple):
    """One pair of a micro-batch: its sample's key and image, crop and place, and its pixels."""

    key: str
    image: str
    crop: Crop
    slot: Slot
    pixels: BlurPair | Waiting


class Made(NamedTuple):
    """What a worker sends for a micro-batch.

    batch: what it knows of a `Batch`, numbers as arrays (torch would give each tensor shared memory of its own).
    waiting: the pairs, where some of their pixels are still to be made. bad: (source, sample, message) of samples that
    could not be read. failure: why no batch will come any more; the rest is empty then.
    """

    batch: dict[str, Any]
    waiting: list[BlurPair | Waiting] | None = None
    bad: tuple[tuple[int, int, str], ...] = ()
    failure: str | None = None


def collate(pairs: Sequence[Planned], bad: Sequence[tuple[int, int, str]] = ()) -> Made:
    """One micro-batch of pairs."""
    batch = {
        "key": [pair.key for pair in pairs],
        "image": [pair.image for pair in pairs],
        "box": np.array([pair.crop.box for pair in pairs], np.int64),
        "crop": np.array([pair.crop.number for pair in pairs], np.int64),
        "flip": np.array([pair.crop.flip for pair in pairs], bool),
        "epoch": np.array([pair.slot.epoch for pair in pairs], np.int64),
        "source": np.array([pair.slot.source for pair in pairs], np.int64),
        "position": np.array([pair.slot.position for pair in pairs], np.int64),
    }
    pixels = [pair.pixels for pair in pairs]
    if any(isinstance(each, Waiting) for each in pixels):
        return Made(batch, pixels, tuple(bad))
    return Made(batch | _columns(pixels, "cpu"), None, tuple(bad))


def finish(made: Made, device: torch.device | str | None, samples_consumed: int) -> Batch:
    """The batch of what a worker sent; what waits for its pixels is rendered on `device`, recorded pairs are copied."""
    batch = made.batch
    if made.waiting is not None:
        waiting = [pair for pair in made.waiting if isinstance(pair, Waiting)]
        rendered = iter(pairs_of_plans([pair.plan for pair in waiting], device, [pair.attempt for pair in waiting]))
        batch |= _columns([next(rendered) if isinstance(pair, Waiting) else pair for pair in made.waiting], device)
    tensors = {name: torch.from_numpy(value) for name, value in batch.items() if isinstance(value, np.ndarray)}
    return Batch(**batch | tensors, samples_consumed=samples_consumed)


def _columns(pairs: Sequence[BlurPair], device: torch.device | str) -> dict[str, Any]:
    """The part of a batch that is known once pixels are: images and what was measured on them.

    The images' memory stays as pictures are, a pixel's channels side by side, which convolutions on a CPU are sensitive
    to in their last bits; what a GPU rendered is put plane by plane.
    """
    images = {
        name: torch.stack([torch.as_tensor(getattr(pair, name)).to(device) for pair in pairs]).permute(0, 3, 1, 2)
        for name in ("blurry", "sharp")
    }
    if device != "cpu":
        images = {name: image.contiguous() for name, image in images.items()}
    return {
        **images,
        **{name: [pair.meta[name] for pair in pairs] for name in ("tier", "generator", "seed")},
        **{name: np.array([pair.meta[name] for pair in pairs], np.float32) for name in ("extent", "input_psnr")},
    }
