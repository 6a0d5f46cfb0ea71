"""Restore pictures of any size: whole, or in overlapping tiles joined by smooth windows, band by band."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.padding import pad_to_multiple
from train.config.patches import largest_crop
from train.config.schema import Config
from train.log import log

TILE_FACTOR = 1.5  # of the training crop: the statistics of semantic attention drift on much larger images
OVERLAP = 0.25  # of a tile's side, shared with each neighbour
DROPPED = 1 / 3  # of what two tiles share, at either tile's border: not used, because its surroundings are missing
SMALLEST_TILE = 64
TOPS = {torch.uint8: 255, torch.uint16: 65535}  # white, of the integers that pictures come in

OnTile = Callable[[int, int], None]


class Way(NamedTuple):
    """How a tile is restored. precision: of the arithmetic, under autocast (None: the weights'). ensemble: the mean of
    the eight flips and turns of the tile, at eight times the cost (Timofte et al., CVPR 2016, section 3.4).
    strength: 0 gives the input back, 1 what was restored."""

    precision: torch.dtype | None = None
    ensemble: bool = False
    strength: float = 1.0


PLAIN = Way()


class Side(NamedTuple):
    """One side of a picture cut into tiles: first pixels, a tile's length, and each tile's weights [length] (shorter at
    the picture's end), whose sum is 1 at every pixel."""

    starts: list[int]
    length: int
    windows: list[Tensor]


def default_tile(config: Config) -> int:
    """Side of a tile in px: 1.5 times the training crop, a multiple of 32."""
    return max(SMALLEST_TILE, math.ceil(TILE_FACTOR * largest_crop(config) / 32) * 32)


def restore_image(
    network: nn.Module,
    image: Tensor,
    tile: int | None,
    on_tile: OnTile = lambda done, all_: None,
    *,
    batch: int = 1,
    way: Way = PLAIN,
) -> Tensor:
    """Restore an sRGB image [3, H, W] on any device → [3, H, W] on the CPU: floats in [0, 1] become float32, clamped;
    uint8 and uint16 stay what they are, rounded.

    tile: side of square tiles in px, each sharing a quarter with its neighbours; None restores the image whole.
    batch: tiles that are restored at once. The network's device decides where the work is done, and its `multiple`
    where tiles may begin: on the same grid as the whole image's, so that a network that sees no further than a twelfth
    of the tile's side gives what it gives of the whole. When the GPU's memory does not suffice, batches and then tiles
    get smaller, and the log says so. `on_tile(tiles done, all)`.
    """
    while True:
        result = torch.empty(image.shape, dtype=image.dtype if image.dtype in TOPS else torch.float32)
        try:
            for top, rows in restore_bands(network, image, tile, on_tile, batch=batch, way=way):
                result[:, top : top + rows.shape[1]] = rows.cpu()
            return result
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            tile, batch = _smaller(tile, batch, image)


def _smaller(tile: int | None, batch: int, image: Tensor) -> tuple[int, int]:
    side = max(image.shape[-2:])
    tile = side if tile is None else min(tile, side)
    if batch == 1 and tile <= SMALLEST_TILE:
        raise ValueError(f"out of GPU memory even with tiles of {tile} px: use --device cpu") from None
    tile, batch = (tile, batch // 2) if batch > 1 else (max(SMALLEST_TILE, tile // 2), 1)
    log.warning("out of GPU memory: tiles of %d px, %d at once", tile, batch)
    return tile, batch


def restore_bands(
    network: nn.Module,
    image: Tensor,
    tile: int | None,
    on_tile: OnTile = lambda done, all_: None,
    *,
    batch: int = 1,
    way: Way = PLAIN,
) -> Iterator[tuple[int, Tensor]]:
    """As `restore_image`, but (first row, rows [3, h, W]) one after the other, on the network's device: no more than a
    tile's height of the picture is ever held as floats."""
    device = next(network.parameters()).device
    _, height, width = image.shape
    rows, columns = (split_side(size, tile, network.multiple) for size in (height, width))
    windows = [window.to(device) for window in columns.windows]
    done, every = 0, len(rows.starts) * len(columns.starts)
    band, first = torch.zeros(3, 0, width, device=device), 0
    for top, window, after in zip(rows.starts, rows.windows, [*rows.starts[1:], height], strict=True):
        source = as_floats(image[:, top : top + rows.length].to(device))
        kept = band[:, top - first :]  # the part of the last row of tiles that this one overlaps
        band, first = torch.zeros_like(source), top
        band[:, : kept.shape[1]] = kept
        weights = window.to(device)[:, None]
        padded = pad_to_multiple(source[None], network.multiple)[0] if len(columns.starts) > 1 else source
        for start in range(0, len(columns.starts), batch):
            lefts = columns.starts[start : start + batch]
            pieces = torch.stack([padded[:, :, left : left + columns.length] for left in lefts])
            for left, own, piece in zip(lefts, windows[start:], restore_batch(network, pieces, way), strict=False):
                band[:, :, left : left + len(own)] += piece[:, : len(weights), : len(own)] * (weights * own)
            done += len(lefts)
            on_tile(done, every)
        ready = band[:, : after - top]
        if way.strength < 1:
            before = source[:, : after - top]
            ready = before + way.strength * (ready - before)
        yield top, from_floats(ready, image.dtype)


def restore_batch(network: nn.Module, images: Tensor, way: Way = PLAIN) -> Tensor:
    """Restore a batch [B, 3, H, W] of floats on the network's device at once → float32, clamped; `strength` is left to
    the caller."""
    on = torch.autocast(images.device.type, way.precision) if way.precision else contextlib.nullcontext()
    with torch.inference_mode(), on:
        if not way.ensemble:
            return network(images).restored[-1].float().clamp(0, 1)
        total = torch.zeros_like(images)
        for turn in range(8):
            total += _turned(network(_turned(images, turn)).restored[-1].float(), turn, back=True)
        return (total / 8).clamp(0, 1)


def _turned(images: Tensor, turn: int, back: bool = False) -> Tensor:
    """One of the eight flips and quarter turns, or the way back."""
    quarters, flip = turn % 4, turn >= 4
    if back:
        return torch.rot90(images.flip(-1) if flip else images, -quarters, (-2, -1))
    images = torch.rot90(images, quarters, (-2, -1))
    return images.flip(-1) if flip else images


def as_floats(image: Tensor) -> Tensor:
    """float32 in [0, 1] of a picture of uint8, uint16 or floats."""
    return image.float().div_(TOPS[image.dtype]) if image.dtype in TOPS else image.float()


def from_floats(image: Tensor, dtype: torch.dtype) -> Tensor:
    """The picture as `dtype` if that is uint8 or uint16, rounded, else as float32."""
    return (image * TOPS[dtype]).round().to(dtype) if dtype in TOPS else image


def split_side(size: int, tile: int | None, multiple: int = 1) -> Side:
    """Cut a side of `size` px into tiles of `tile` px (rounded up to the multiple), evenly spread, neighbours sharing
    at least a quarter, less what beginning at multiples costs. The last tile may reach over the picture's end, by less
    than the multiple: by what the whole picture would be padded."""
    tile = size if tile is None else math.ceil(tile / multiple) * multiple
    if size <= tile:
        return Side([0], size, [torch.ones(size)])
    last = math.ceil((size - tile) / multiple) * multiple
    count = 1 + math.ceil(last / (tile * (1 - OVERLAP)))
    starts = [round(i * last / (count - 1) / multiple) * multiple for i in range(count)]
    windows = [_window(place, starts, tile)[: size - start] for place, start in enumerate(starts)]
    total = torch.zeros(size)
    for start, window in zip(starts, windows, strict=True):
        total[start : start + tile] += window
    windows = [window / total[start : start + tile] for start, window in zip(starts, windows, strict=True)]
    return Side(starts, tile, windows)


def _window(place: int, starts: list[int], tile: int) -> Tensor:
    """Weights [tile] of a tile along one side: 1 in its middle; of what it shares with a neighbour a third is 0 at its
    own border, a third goes up by half a cosine. A border of the image has no ramp."""
    window = torch.ones(tile)
    if place > 0:
        shared = starts[place - 1] + tile - starts[place]
        window[:shared] *= _ramp(shared)
    if place + 1 < len(starts):
        shared = starts[place] + tile - starts[place + 1]
        window[tile - shared :] *= _ramp(shared).flip(0)
    return window


def _ramp(length: int) -> Tensor:
    """From 0 to 1 over `length` px; with its mirror image it sums to 1."""
    inner = length - 2 * int(length * DROPPED)
    place = (torch.arange(length) - (length - inner) / 2 + 0.5) / inner
    return 0.5 - 0.5 * torch.cos(place.clamp(0, 1) * math.pi)
