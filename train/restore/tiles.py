"""Restore photographs of any size: whole, or in overlapping tiles joined by smooth windows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from train.config.patches import largest_crop
from train.config.schema import Config
from train.log import log

TILE_FACTOR = 1.5  # of the training crop: the statistics of semantic attention drift on much larger images
OVERLAP = 0.25  # of a tile's side, shared with each neighbour
SMALLEST_TILE = 64


def default_tile(config: Config) -> int:
    """Side of a tile in px: 1.5 times the training crop, a multiple of 32."""
    return max(SMALLEST_TILE, math.ceil(TILE_FACTOR * largest_crop(config) / 32) * 32)


@torch.no_grad()
def restore_image(
    network: torch.nn.Module,
    image: torch.Tensor,
    tile: int | None,
    on_tile: Callable[[int, int], None] = lambda done, all_: None,
) -> torch.Tensor:
    """Restore an sRGB image [3, H, W] float in [0, 1] on any device → [3, H, W] float32 on the CPU, clamped.

    tile: side of square tiles in px, each overlapping its neighbours by a quarter, blended by windows that sum to 1
    everywhere; None restores the image whole. When the GPU's memory does not suffice, tiles get smaller, and the log
    says so once. The network's device decides where the work is done. `on_tile(tiles done, all)`.
    """
    device = next(network.parameters()).device
    _, height, width = image.shape
    if tile is None or (height <= tile and width <= tile):
        try:
            return _forward(network, image.to(device)).cpu()
        except torch.cuda.OutOfMemoryError:
            tile = max(SMALLEST_TILE, max(height, width) // 2)
            log.warning("out of GPU memory on %d×%d px: restoring in tiles of %d px", width, height, tile)
    while True:
        try:
            return _restore_tiles(network, image, tile, device, on_tile)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            if tile <= SMALLEST_TILE:
                raise ValueError(f"out of GPU memory even with tiles of {tile} px: use --device cpu") from None
            tile = max(SMALLEST_TILE, tile // 2)
            log.warning("out of GPU memory: tiles of %d px", tile)


def _restore_tiles(
    network: torch.nn.Module,
    image: torch.Tensor,
    tile: int,
    device: torch.device,
    on_tile: Callable[[int, int], None],
) -> torch.Tensor:
    _, height, width = image.shape
    rows, columns = tile_starts(height, tile), tile_starts(width, tile)
    total = torch.zeros(3, height, width)
    weight = torch.zeros(height, width)
    done = 0
    for top in rows:
        for left in columns:
            piece = image[:, top : top + tile, left : left + tile].to(device)
            restored = _forward(network, piece).cpu()
            window = tile_window(top, rows, tile, height)[:, None] * tile_window(left, columns, tile, width)[None, :]
            area = (slice(top, top + piece.shape[1]), slice(left, left + piece.shape[2]))
            total[(slice(None), *area)] += restored * window
            weight[area] += window
            done += 1
            on_tile(done, len(rows) * len(columns))
    return total.div_(weight)


def _forward(network: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    return network(image[None]).restored[-1][0].float().clamp(0, 1)


def tile_starts(size: int, tile: int) -> list[int]:
    """First pixels of tiles along a side of `size` px, evenly spread, neighbours sharing at least a quarter."""
    if size <= tile:
        return [0]
    count = 1 + math.ceil((size - tile) / (tile * (1 - OVERLAP)))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def tile_window(start: int, starts: list[int], tile: int, size: int) -> torch.Tensor:
    """Weights [min(tile, size)] of a tile along one side: 1 in its middle, half a cosine down over what it shares
    with a neighbour. A border of the image has no ramp."""
    length = min(tile, size)
    window = torch.ones(length)
    place = starts.index(start)
    if place > 0:
        shared = starts[place - 1] + tile - start
        window[:shared] *= _ramp(shared)
    if place + 1 < len(starts):
        shared = start + tile - starts[place + 1]
        window[length - shared :] *= _ramp(shared).flip(0)
    return window


def _ramp(length: int) -> torch.Tensor:
    """Half a cosine from just above 0 to just below 1; with its mirror image it sums to 1."""
    return 0.5 - 0.5 * torch.cos((torch.arange(length) + 0.5) / length * math.pi)
