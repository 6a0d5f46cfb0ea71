"""Uformer: a UNet of window-attention transformer blocks (Wang et al., CVPR 2022, arXiv 2106.03106).

Shapes: features are [B, H, W, C] inside, which is channels last: layer norms and linear layers work on the last axis.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.backbones.layers import depthwise
from model.backbones.points import Embed, identity

SEPARATE = -100.0  # added to the logits of two tokens that a shifted window brings together from opposite borders


class Projection(nn.Module):
    """Queries, and keys beside values: two linear layers, windows [N, n, C] → three [N, heads, n, C/heads]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = rearrange(self.to_q(x), "N n (head d) -> N head n d", head=self.heads)
        k, v = rearrange(self.to_kv(x), "N n (two head d) -> two N head n d", two=2, head=self.heads)
        return q, k, v


class WindowAttention(nn.Module):
    """Attention inside windows of side² tokens, with a learned bias for each relative position.

    windows [N, side², C] → the same; N = B · windows of an image, the windows running fastest.
    separate: [windows of an image, side², side²] added to every head's logits, or None.
    """

    def __init__(self, dim: int, side: int, heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * side - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_positions(side))
        self.qkv = Projection(dim, heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, windows: Tensor, separate: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(windows)
        bias = self.relative_position_bias_table[self.relative_position_index]  # [side², side², heads]
        bias = rearrange(bias, "n m head -> 1 head n m")
        if separate is not None:
            bias = bias + separate[:, None]
            bias = bias.expand(q.shape[0] // bias.shape[0], *bias.shape).flatten(0, 1)  # len() would want a number
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(rearrange(out, "N head n d -> N n (head d)"))


def relative_positions(side: int) -> Tensor:
    """int64 [side², side²]: which row of a table of (2·side − 1)² relative positions stands for two tokens."""
    row, column = torch.arange(side**2) // side, torch.arange(side**2) % side
    down = row[:, None] - row[None, :] + side - 1
    right = column[:, None] - column[None, :] + side - 1
    return down * (2 * side - 1) + right


class LeFF(nn.Module):
    """Locally-enhanced feed-forward, [B, H, W, C] → the same: a depthwise convolution between two linear layers."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Sequential(nn.Linear(dim, hidden), nn.GELU())
        self.dwconv = nn.Sequential(depthwise(hidden), nn.GELU())
        self.linear2 = nn.Sequential(nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dwconv(self.linear1(x).permute(0, 3, 1, 2))
        return self.linear2(hidden.permute(0, 2, 3, 1))


class Modulator(nn.Module):
    """One learned vector for each place in a window, added to the tokens: [N, n, C] → the same."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tokens, dim))

    def forward(self, windows: Tensor) -> Tensor:
        return windows + self.weight


class LeWinTransformerBlock(nn.Module):
    """[B, H, W, C] → the same: attention in windows of side `side`, moved by `shift` px, then feed-forward."""

    def __init__(self, dim: int, heads: int, side: int, shift: int, modulator: bool) -> None:
        super().__init__()
        self.side, self.shift = side, shift
        self.modulator = Modulator(side**2, dim) if modulator else nn.Identity()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, side, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = LeFF(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        rows, side = x.shape[1] // self.side, self.side
        separate = None
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
            separate = separated(x.shape[1], x.shape[2], side, self.shift, x.device)
        windows = rearrange(x, "b (y p) (x q) c -> (b y x) (p q) c", p=side, q=side)
        windows = self.attn(self.modulator(windows), separate)
        x = rearrange(windows, "(b y x) (p q) c -> b (y p) (x q) c", b=x.shape[0], y=rows, p=side)
        return x.roll((self.shift, self.shift), dims=(1, 2)) if self.shift else x


def separated(height: int, width: int, side: int, shift: int, device: torch.device) -> Tensor:
    """[windows, side², side²]: 0 for two tokens of a shifted window that are neighbours in the image, else SEPARATE."""

    def part(length: int) -> Tensor:
        place = torch.arange(length, device=device)
        return (place >= length - side).long() + (place >= length - shift).long()

    region = 3 * part(height)[:, None] + part(width)[None, :]
    region = rearrange(region, "(y p) (x q) -> (y x) (p q)", p=side, q=side)
    return (region[:, :, None] != region[:, None, :]) * SEPARATE


class Layer(nn.Module):
    """The blocks of one level, every second one shifted by half a window: [B, H, W, C] → the same."""

    def __init__(self, dim: int, depth: int, heads: int, side: int, *, shifted: bool, modulator: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            LeWinTransformerBlock(dim, heads, side, side // 2 if shifted and i % 2 else 0, modulator)
            for i in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Downsample(nn.Module):
    """[B, H, W, C] → [B, H/2, W/2, 2C] by a 4×4 convolution of stride 2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(dim, 2 * dim, 4, stride=2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Upsample(nn.Module):
    """[B, H, W, inputs] → [B, 2H, 2W, outputs] by a 2×2 transposed convolution of stride 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.deconv = nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 2, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.deconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ImageConv(nn.Module):
    """The convolution where the image enters ([B, 3, H, W] → tokens) or leaves; its parameters are `proj.0.*`."""

    def __init__(self, inputs: int, outputs: int, *activation: nn.Module) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), *activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Uformer(nn.Module):
    """Blurry [B, 3, H, W] → (restored [B, 3, H, W],), sRGB, nominally in [0, 1]; H, W multiples of `stride_multiple`.

    Five levels of stride 1 … 16. Encoder level l = 0..3 has embed_dim·2^l channels and heads of embed_dim; the
    bottleneck (`conv`) 16·embed_dim; a decoder level twice the encoder's channels (the skip is put beside what comes
    up) and modulators. `depths` counts the blocks of the nine stages in their order. The defaults are Uformer-B.
    img_size: the training crop, px; a level whose map is then no larger than a window does not shift its windows.
    256 is that of the official training for GoPro (the official evaluation builds the network with 128).

    Keys and shapes of the state dict are those of the official release, which computes squares only, and pads an image
    with zeros to one; here any height and width will do, and `Deblurrer` mirrors, so results differ near the borders
    of what is not a square. Stochastic depth, which the release trains with, is left out.
    `embed_points` {name: (channels, stride)}: `bottleneck` and every decoder level but the full-size one, named by
    the level (`decoder2`: stride 2); `embed(name, feature)` is called there, before the level's blocks.
    ValueError for counts that make no network.
    """

    def __init__(
        self,
        img_size: int = 256,
        embed_dim: int = 32,
        depths: Sequence[int] = (1, 2, 8, 8, 2, 8, 8, 2, 1),
        win_size: int = 8,
    ) -> None:
        super().__init__()
        if len(depths) != 9 or min(depths) < 0 or embed_dim < 1 or win_size < 2 or img_size < 16 * win_size:
            raise ValueError(
                "a Uformer needs nine depths ≥ 0, embed_dim ≥ 1, win_size ≥ 2 and an img_size of 16 windows or more, "
                f"got depths {list(depths)}, embed_dim {embed_dim}, win_size {win_size}, img_size {img_size}"
            )

        def layer(stage: int, level: int, *, decoder: bool) -> Layer:
            width = 2 ** (level + decoder)
            shifted = img_size // 2**level > win_size
            return Layer(embed_dim * width, depths[stage], width, win_size, shifted=shifted, modulator=decoder)

        self.stride_multiple = 16 * win_size
        self.embed_points = {
            "bottleneck": (16 * embed_dim, 16),
            "decoder4": (16 * embed_dim, 8),
            "decoder3": (8 * embed_dim, 4),
            "decoder2": (4 * embed_dim, 2),
        }
        self.input_proj = ImageConv(3, embed_dim, nn.LeakyReLU())
        self.output_proj = ImageConv(2 * embed_dim, 3)
        self.encoderlayer_0 = layer(0, 0, decoder=False)
        self.dowsample_0 = Downsample(embed_dim)
        self.encoderlayer_1 = layer(1, 1, decoder=False)
        self.dowsample_1 = Downsample(2 * embed_dim)
        self.encoderlayer_2 = layer(2, 2, decoder=False)
        self.dowsample_2 = Downsample(4 * embed_dim)
        self.encoderlayer_3 = layer(3, 3, decoder=False)
        self.dowsample_3 = Downsample(8 * embed_dim)
        self.conv = layer(4, 4, decoder=False)
        self.upsample_0 = Upsample(16 * embed_dim, 8 * embed_dim)
        self.decoderlayer_0 = layer(5, 3, decoder=True)
        self.upsample_1 = Upsample(16 * embed_dim, 4 * embed_dim)
        self.decoderlayer_1 = layer(6, 2, decoder=True)
        self.upsample_2 = Upsample(8 * embed_dim, 2 * embed_dim)
        self.decoderlayer_2 = layer(7, 1, decoder=True)
        self.upsample_3 = Upsample(4 * embed_dim, embed_dim)
        self.decoderlayer_3 = layer(8, 0, decoder=True)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, embed: Embed = identity) -> tuple[Tensor, ...]:
        def embedded(name: str, tokens: Tensor) -> Tensor:
            return embed(name, tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

        level0 = self.encoderlayer_0(self.input_proj(x).permute(0, 2, 3, 1))
        level1 = self.encoderlayer_1(self.dowsample_0(level0))
        level2 = self.encoderlayer_2(self.dowsample_1(level1))
        level3 = self.encoderlayer_3(self.dowsample_2(level2))
        y = self.conv(embedded("bottleneck", self.dowsample_3(level3)))
        y = self.decoderlayer_0(embedded("decoder4", torch.cat([self.upsample_0(y), level3], dim=-1)))
        y = self.decoderlayer_1(embedded("decoder3", torch.cat([self.upsample_1(y), level2], dim=-1)))
        y = self.decoderlayer_2(embedded("decoder2", torch.cat([self.upsample_2(y), level1], dim=-1)))
        y = self.decoderlayer_3(torch.cat([self.upsample_3(y), level0], dim=-1))
        return (x + self.output_proj(y.permute(0, 3, 1, 2)),)
