"""Restore photographs of any size: whole, or in overlapping tiles joined by smooth windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from train.config.schema import Config
from train.log import log
from train.restore.picture import READABLE, Picture, PictureError, check_target, read_picture, write_picture

TILE_FACTOR = 1.5  # of the training crop: the statistics of semantic attention drift on much larger images
OVERLAP = 0.25  # of a tile's side, shared with each neighbour
SMALLEST_TILE = 64


def default_tile(config: Config) -> int:
    """Side of a tile in px: 1.5 times the training crop, a multiple of 32."""
    return max(SMALLEST_TILE, math.ceil(TILE_FACTOR * config.data.crop / 32) * 32)


@torch.no_grad()
def restore_image(network: torch.nn.Module, image: torch.Tensor, tile: int | None) -> torch.Tensor:
    """Restore an sRGB image [3, H, W] float in [0, 1] on any device → [3, H, W] float32 on the CPU, clamped.

    tile: side of square tiles in px, each overlapping its neighbours by a quarter, blended by windows that sum to 1
    everywhere; None restores the image whole. When the GPU's memory does not suffice, tiles get smaller, and the log
    says so once. The network's device decides where the work is done.
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
            return _restore_tiles(network, image, tile, device)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            if tile <= SMALLEST_TILE:
                raise ValueError(f"out of GPU memory even with tiles of {tile} px: use --device cpu") from None
            tile = max(SMALLEST_TILE, tile // 2)
            log.warning("out of GPU memory: tiles of %d px", tile)


def _restore_tiles(network: torch.nn.Module, image: torch.Tensor, tile: int, device: torch.device) -> torch.Tensor:
    _, height, width = image.shape
    rows, columns = tile_starts(height, tile), tile_starts(width, tile)
    total = torch.zeros(3, height, width)
    weight = torch.zeros(height, width)
    for top in rows:
        for left in columns:
            piece = image[:, top : top + tile, left : left + tile].to(device)
            restored = _forward(network, piece).cpu()
            window = tile_window(top, rows, tile, height)[:, None] * tile_window(left, columns, tile, width)[None, :]
            area = (slice(top, top + piece.shape[1]), slice(left, left + piece.shape[2]))
            total[(slice(None), *area)] += restored * window
            weight[area] += window
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


def restore_file(network: torch.nn.Module, source: Path, target: Path, *, tile: int | None, overwrite: bool) -> Picture:
    """Restore one photograph file into another. PictureError names the file."""
    check_target(target, overwrite=overwrite)
    picture = read_picture(source)
    image = torch.from_numpy(np.ascontiguousarray(picture.rgb.transpose(2, 0, 1)))
    restored = restore_image(network, image, tile)
    result = replace(picture, rgb=restored.permute(1, 2, 0).numpy())
    write_picture(target, result, overwrite=overwrite)
    return result


def restore_all(
    network: torch.nn.Module,
    source: Path,
    target: Path,
    *,
    tile: int | None,
    overwrite: bool,
    on_file: Callable[[Path, str | None], None],
) -> int:
    """Restore a file, or every picture of a folder into the folder `target`; returns how many failed.

    `on_file(path, problem)` is told of each. A picture that cannot be read does not stop the others.
    """
    if source.is_dir():
        files = sorted(
            path
            for path in source.iterdir()
            if path.suffix.lower() in READABLE and path.is_file() and not path.name.startswith(".")
        )
        if not files:
            raise PictureError(f"{source}: no pictures in this folder ({', '.join(READABLE)})")
        if target.is_file():
            raise PictureError(f"{target}: is a file: give a folder for a folder")
        jobs = [(path, target / _writable_name(path)) for path in files]
        names = [destination.name for _, destination in jobs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise PictureError(f"{source}: two of its pictures would become {twice}: rename one")
        target.mkdir(parents=True, exist_ok=True)
    else:
        jobs = [(source, target / _writable_name(source) if target.is_dir() else target)]
    failed = 0
    for path, destination in jobs:
        try:
            restore_file(network, path, destination, tile=tile, overwrite=overwrite)
            on_file(path, None)
        except PictureError as error:
            failed += 1
            on_file(path, str(error))
    return failed


def _writable_name(path: Path) -> str:
    return path.name if path.suffix.lower() != ".bmp" else f"{path.stem}.png"
