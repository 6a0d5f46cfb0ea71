"""The same pairs made in batches with PyTorch: uniform blur by FFT, rotation by grid_sample, then the camera."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from data.blur import photometry as camera
from data.blur.attempt import Attempt, PairPlan, attempts_of, draw_attempt, lamps_behind, psnr_miss, sharp_crop
from data.blur.batched_isp import develop_batch, sharpen_batch
from data.blur.batched_jpeg import jpeg_batch
from data.blur.kernel import fast_dft_size
from data.blur.layers import Layers
from data.blur.pair import BlurPair, Result, better, pair_meta
from data.blur.rolling import Rolling
from data.blur.rotation import Rotation
from data.blur.severity import PSNR_CAP

_PLANES = 96  # planes transformed at once: bounds the memory of spectra (96 of 512² px: 400 MB with the copies)
_POSES = 16  # poses sampled at once


@torch.no_grad()
def pairs_of_plans(
    plans: Sequence[PairPlan], device: torch.device | str, first: Sequence[Attempt] | None = None
) -> list[BlurPair]:
    """The pairs of plans as `pair_of_plan` makes them, with sharp and blurry [S, S, 3] uint8 on `device`.

    All crops have one size. first: the plans' attempts number 0, where a loading worker has drawn them already.
    Equal to the CPU's pairs up to float32 rounding (1e-3 of white before quantisation); JPEG differs by its rounding.
    """
    if not plans:
        return []
    sizes = {plan.frame.size for plan in plans}
    if len(sizes) > 1:
        raise ValueError(f"crops of {', '.join(map(str, sorted(sizes)))} px in one batch: give crops of one size")
    device = torch.device(device)
    sharp = torch.from_numpy(np.stack([sharp_crop(plan) for plan in plans])).to(device)
    best: list[Result | None] = [None] * len(plans)
    made = [0] * len(plans)
    open_ = list(range(len(plans)))
    for number in range(max(attempts_of(plan) for plan in plans)):
        attempts = [first[i] if number == 0 and first is not None else draw_attempt(plans[i], number) for i in open_]
        blurry = render_batch(attempts, device)
        qualities = _psnr(blurry, sharp[open_]).tolist()
        for i, attempt, quality, picture in zip(open_, attempts, qualities, blurry, strict=True):
            made[i] += 1
            best[i] = better(best[i], Result(attempt, quality, psnr_miss(quality, plans[i]), picture))
        open_ = [i for i in open_ if best[i].miss > 0 and made[i] < attempts_of(plans[i])]
        if not open_:
            break
    return [
        BlurPair(result.blurry, picture, result.attempt.recipe.kernel, pair_meta(plan, result, count))
        for plan, result, picture, count in zip(plans, best, sharp, made, strict=True)
    ]


@torch.no_grad()
def render_batch(attempts: Sequence[Attempt], device: torch.device | str) -> torch.Tensor:
    """Blurry crops [B, S, S, 3] uint8 of attempts at crops of one size."""
    light = blurred_light_batch(attempts, device)
    photometry = [attempt.recipe.photometry for attempt in attempts]
    gains = _column([p.gains for p in photometry], device)  # [B, 3]
    shot = _column([[p.shot] for p in photometry], device) * gains
    read = (_column([[p.read] for p in photometry], device) * gains) ** 2
    # Sent as int16: operations on uint16 are few on a GPU.
    noise = torch.from_numpy(np.stack([attempt.noise for attempt in attempts]).view(np.int16)).to(device)
    quantiles = torch.from_numpy(camera.normal_quantiles()).to(device)
    deviates = quantiles[noise.int().bitwise_and(0xFFFF)].permute(0, 2, 3, 1)  # [B, S, S, 3]
    light = light + deviates * torch.sqrt(light * shot[:, None, None] + read[:, None, None])
    codes = _codes(light, photometry)
    chosen = [i for i, p in enumerate(photometry) if p.jpeg_quality is not None]
    if chosen:
        codes[chosen] = jpeg_batch(codes[chosen], [photometry[i].jpeg_quality for i in chosen])
    return codes


@torch.no_grad()
def blurred_light_batch(attempts: Sequence[Attempt], device: torch.device | str) -> torch.Tensor:
    """Linear light [B, S, S, 3] float32 that reaches the sensor, clipped to its white, before noise."""
    size = attempts[0].noise.shape[-1]
    device = torch.device(device)
    result = torch.empty(len(attempts), size, size, 3, device=device)
    uniform = [i for i, each in enumerate(attempts) if not isinstance(each.recipe.motion, Rotation | Rolling)]
    if uniform:
        result[uniform] = _convolved([attempts[i] for i in uniform], size, device)
    for i in set(range(len(attempts))) - set(uniform):
        motion, light = attempts[i].recipe.motion, _scene(attempts[i].window, attempts[i], device, attempts[i].lamps)
        average = _rotated if isinstance(motion, Rotation) else _rolled
        result[i] = average(light, motion, size).permute(1, 2, 0)
    white = np.stack([camera.white_of(attempt.window, attempt.recipe.photometry.response) for attempt in attempts])
    white = torch.from_numpy(white).to(device)[:, None, None]
    return torch.minimum(result.clamp_min(0), white)


def _scene(codes: np.ndarray, attempt: Attempt, device: torch.device, lamps: np.ndarray | None) -> torch.Tensor:
    """Scene light [3, H, W] float32 of codes [H, W, 3] uint8: decoded, highlights and lamps [H, W] boosted."""
    pixels = torch.from_numpy(codes).to(device).permute(2, 0, 1).int()
    light = torch.from_numpy(attempt.recipe.photometry.response.to_linear).to(device)[pixels]
    boost, trail = attempt.recipe.photometry.highlight_boost, attempt.recipe.photometry.trail
    gain = 1 + boost * torch.from_numpy(camera.highlight_table()).to(device)[pixels.amax(0)] if boost > 0 else 1.0
    if trail > 0 and lamps is not None:
        gain = gain + trail * torch.from_numpy(lamps).to(device)
    return light * gain


def _convolved(attempts: Sequence[Attempt], size: int, device: torch.device) -> torch.Tensor:
    """Uniform blur and layers [B, S, S, 3]: every plane of every scene is convolved in one batch of transforms."""
    planes: list[torch.Tensor] = []  # each [h, w]
    jobs: list[tuple[np.ndarray, int]] = []  # its kernel, and where its crop begins in the convolved plane
    spans: list[int] = []
    for attempt in attempts:
        motion, margin = attempt.recipe.motion, attempt.recipe.margin
        light = _scene(attempt.window, attempt, device, attempt.lamps)
        if isinstance(motion, Layers):
            parts = [(_scene(attempt.background, attempt, device, lamps_behind(attempt)), motion.kernels[0])]
            for mask, kernel in zip(motion.masks, motion.kernels[1:], strict=True):
                opacity = torch.from_numpy(mask).to(device).float() / 255
                parts.append((torch.cat([light * opacity, opacity[None]]), kernel))
        else:
            parts = [(light, motion)]
        for stack, kernel in parts:
            planes += list(stack)
            jobs += [(kernel, margin + len(kernel) // 2)] * len(stack)
        spans.append(sum(len(stack) for stack, _ in parts))
    blurred = _fft_convolve(planes, jobs, size, device)
    scenes = []
    for stack in torch.split(blurred, spans):
        scene = stack[:3]
        for layer in torch.split(stack[3:], 4) if len(stack) > 3 else ():
            scene = scene * (1 - layer[3:]) + layer[:3]
        scenes.append(scene.permute(1, 2, 0))
    return torch.stack(scenes)


def _fft_convolve(
    planes: list[torch.Tensor], jobs: list[tuple[np.ndarray, int]], size: int, device: torch.device
) -> torch.Tensor:
    """Planes of any size → [P, S, S] float32, each convolved with its kernel and cut to its crop."""
    result = torch.empty(len(planes), size, size, device=device)
    # Small planes with small ones: the largest of a chunk sets the size of its transforms.
    order = sorted(range(len(planes)), key=lambda i: planes[i].shape[0])
    for at in range(0, len(order), _PLANES):
        chunk = order[at : at + _PLANES]
        side = fast_dft_size(max(planes[i].shape[0] for i in chunk))
        kernels = {id(jobs[i][0]): jobs[i][0] for i in chunk}
        place = {name: n for n, name in enumerate(kernels)}
        transfer = torch.zeros(len(kernels), side, side)
        for n, kernel in enumerate(kernels.values()):
            transfer[n, : len(kernel), : len(kernel)] = torch.from_numpy(kernel)
        spectra = torch.fft.rfft2(transfer.to(device))
        padded = torch.zeros(len(chunk), side, side, device=device)
        for n, i in enumerate(chunk):
            padded[n, : planes[i].shape[0], : planes[i].shape[1]] = planes[i]
        spectra = spectra[[place[id(jobs[i][0])] for i in chunk]]
        whole = torch.fft.irfft2(torch.fft.rfft2(padded) * spectra, s=(side, side))
        for n, i in enumerate(chunk):
            first = jobs[i][1]
            result[i] = whole[n, first : first + size, first : first + size]
    return result


def _rotated(light: torch.Tensor, motion: Rotation, size: int) -> torch.Tensor:
    """Average of the poses of a scene [3, H, W] → [3, S, S]."""
    height, width = light.shape[1:]
    at = torch.arange(size, device=light.device, dtype=torch.float32)
    shift = np.array([[1, 0, motion.margin], [0, 1, motion.margin], [0, 0, 1]], float)
    # Pixel centres to [−1, 1] with align_corners=True, folded into the homography in float64.
    normalise = np.array([[2 / (width - 1), 0, -1], [0, 2 / (height - 1), -1], [0, 0, 1]])
    maps = torch.from_numpy((normalise @ shift @ motion.homographies).astype(np.float32)).to(light.device)
    weights = torch.from_numpy(motion.weights.astype(np.float32)).to(light.device)
    result = torch.zeros(3, size, size, device=light.device)
    for some, share in zip(maps.split(_POSES), weights.split(_POSES), strict=True):
        # Written out: a matrix product may run in TF32, which would misplace samples by a px.
        terms = [[some[:, i, j, None, None] for j in range(3)] for i in range(3)]
        x, y, w = (a * at[None, None, :] + b * at[None, :, None] + c for a, b, c in terms)  # each [n, S, S]
        places = torch.stack([x / w, y / w], dim=-1)
        poses = F.grid_sample(
            light.expand(len(some), -1, -1, -1), places, mode="bilinear", padding_mode="border", align_corners=True
        )
        result += (poses * share[:, None, None, None]).sum(dim=0)
    return result


def _rolled(light: torch.Tensor, motion: Rolling, size: int) -> torch.Tensor:
    """Average of the moments of a scene [3, H, W] → [3, S, S]."""
    height, width = light.shape[1:]
    along = torch.linspace(0.0, 1.0, size, device=light.device)
    ends = torch.from_numpy(motion.ends).to(light.device) + motion.margin
    result = torch.zeros(3, size, size, device=light.device)
    for some in ends.split(_POSES):
        x, y = (some[:, :, :1, axis] + (some[:, :, 1:, axis] - some[:, :, :1, axis]) * along for axis in (0, 1))
        places = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
        poses = F.grid_sample(
            light.expand(len(some), -1, -1, -1), places, mode="bilinear", padding_mode="border", align_corners=True
        )
        result += poses.sum(dim=0) / len(motion.ends)
    return result


def _codes(light: torch.Tensor, photometry: Sequence[camera.Photometry]) -> torch.Tensor:
    """uint8 codes of noisy light [B, S, S, 3], a phone's processing where one was drawn."""
    codes = _encode(light, photometry)
    chosen = [i for i, p in enumerate(photometry) if p.denoise is not None]
    if chosen:
        phones = [photometry[i] for i in chosen]
        values = _encode(develop_batch(light[chosen], phones), phones, "to_value")
        codes[chosen] = (sharpen_batch(values, phones) + 0.5).clamp(0, 255).to(torch.uint8)
    return codes


def _encode(light: torch.Tensor, photometry: Sequence[camera.Photometry], table: str = "to_code") -> torch.Tensor:
    """uint8 codes (or float32 `to_value`s) of light [B, S, S, 3], each sample by its own response curve."""
    tables = np.stack([getattr(p.response, table) for p in photometry])
    entries = tables.shape[1] - 1
    index = (light.clamp(0, 1).sqrt() * entries + 0.5).int()
    offset = torch.arange(len(photometry), device=light.device, dtype=torch.int32) * tables.shape[1]
    return torch.from_numpy(tables.reshape(-1)).to(light.device)[index + offset[:, None, None, None]]


def _psnr(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """PSNR in dB per sample of uint8 [B, S, S, 3], float64, at most PSNR_CAP."""
    error = (first.int() - second.int()).double().square().mean(dim=(1, 2, 3))
    return torch.where(error > 0, 10 * torch.log10(255.0**2 / error), PSNR_CAP).clamp_max(PSNR_CAP)


def _column(values: Sequence[Sequence[float]], device: torch.device | str) -> torch.Tensor:
    return torch.tensor(np.array(values, np.float32), device=device)
