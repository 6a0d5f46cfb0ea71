"""Plain vision transformers as a pyramid: which blocks stand for which level, and token maps at a level's stride."""

import torch


def spread_blocks(depth: int, levels: int) -> list[int]:
    """Return the 0-based blocks that stand for levels 1 … L: the last of L equal parts of the network's depth.

    A transformer with one resolution has no pyramid, but its early blocks hold more local structure and its late ones
    more context, so shallow levels read shallow blocks. Our choice.
    """
    return [-(-depth * level // levels) - 1 for level in range(1, levels + 1)]


def resample_tokens(tokens: torch.Tensor, patch: int, stride: int, size: tuple[int, int]) -> torch.Tensor:
    """Return a token map [B, C, h, w] (one token a `patch` px) on the grid of `stride` px: [B, C, *size].

    Cell i of either grid is centred at (i + ½)·side px, so cells of all levels cover the pixels that a convolutional
    network's do, also where the patch is no power of two. A finer grid samples the bilinear interpolation of the
    tokens, a coarser one averages it over its cells. Two matrix products, whose gradient is deterministic on a GPU.
    fp32 also under autocast, the dtype is kept.
    """
    if stride == patch and tuple(tokens.shape[-2:]) == tuple(size):
        return tokens
    with torch.autocast(tokens.device.type, enabled=False):
        wide = tokens.float()
        rows, columns = (
            _weights(want, have, patch, stride, wide.device) for want, have in zip(size, tokens.shape[-2:], strict=True)
        )
        return (rows @ wide @ columns.T).to(tokens.dtype)


def _weights(want: int, have: int, patch: int, stride: int, device: torch.device) -> torch.Tensor:
    """Weights [want, have], rows summing to 1."""
    ratio = stride / patch
    tokens = torch.arange(have, device=device, dtype=torch.float32)
    centres = (torch.arange(want, device=device, dtype=torch.float32)[:, None] + 0.5) * ratio - 0.5
    if ratio <= 1:  # beyond the outermost tokens' centres the outermost counts alone
        return (1 - (centres.clamp(0, have - 1) - tokens).abs()).clamp_min(0)
    weights = _ramp(centres + ratio / 2 - tokens) - _ramp(centres - ratio / 2 - tokens)
    return weights / weights.sum(dim=1, keepdim=True)


def _ramp(x: torch.Tensor) -> torch.Tensor:
    """Area below the unit triangle on [-1, 1] left of x."""
    x = x.clamp(-1, 1)
    return torch.where(x < 0, (x + 1).square() / 2, 1 - (1 - x).square() / 2)
