"""Stripformer (Tsai et al., "Stripformer: Strip Transformer for Fast Image Deblurring", ECCV 2022)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from model.backbones.points import Embed, identity

GREY = 0.5  # the official network is trained on, and returns, images from which this is taken off


def act(x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, 0.2)


def conv_act(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride, padding=size // 2), nn.LeakyReLU(0.2))


def up_act(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1), nn.LeakyReLU(0.2))


def two_convs(inputs: int, outputs: int, size: int = 3) -> nn.Sequential:
    """The inside of a residual unit: conv, LeakyReLU, conv 3×3."""
    return conv_act(inputs, outputs, size).append(nn.Conv2d(outputs, outputs, 3, padding=1))


class ResidualUnit(nn.Sequential):
    """LeakyReLU(x + conv(LeakyReLU(conv(x)))), [B, C, h, w]."""

    recompute = True  # a block for engine.checkpointing, though it is a sequence itself

    def __init__(self, channels: int) -> None:
        super().__init__(*two_convs(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return act(x + super().forward(x))


class Mlp(nn.Module):
    """Two linear layers over the channels of [..., C], GELU between them, four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PEG(nn.Module):
    """Conditional position encoding: x + a depthwise convolution of it (Chu et al., 2021)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.PEG = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.PEG(x)


class StripBlock(nn.Module):
    """A transformer block on [B, C, h, w]: half of the channels attend along rows, half along columns.

    LayerNorm over the channels of a pixel, strip attention, a feed-forward layer per pixel, a position encoding.
    """

    recompute = True  # a block for engine.checkpointing, though it stands in no list (the official names number it)

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(channels)
        self.conv_input = nn.Conv2d(channels, channels, 1)
        self.fuse_out = nn.Conv2d(channels, channels, 1)
        self.ffn_norm = nn.LayerNorm(channels)
        self.ffn = Mlp(channels)
        self.PEG = PEG(channels)

    def attend(self, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two halves [B, C/2, h, w] of the channels → the same shapes; each subclass's own."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = rearrange(self.attention_norm(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")
        attended = self.attend(*self.conv_input(normed).chunk(2, dim=1))
        x = x + self.fuse_out(torch.cat(attended, dim=1))
        pixels = rearrange(x, "b c h w -> b h w c")
        pixels = pixels + self.ffn(self.ffn_norm(pixels))
        return self.PEG(rearrange(pixels, "b h w c -> b c h w"))


class IntraSA(StripBlock):
    """Intra-strip attention: the pixels of a row attend to each other, those of a column to each other."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(channels, heads)
        self.qkv_local_h = nn.Linear(channels // 2, 3 * (channels // 2))
        self.qkv_local_v = nn.Linear(channels // 2, 3 * (channels // 2))

    def attend(self, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            rearrange(self._along(rearrange(rows, "b c h w -> b h w c"), self.qkv_local_h), "b h w c -> b c h w"),
            rearrange(self._along(rearrange(columns, "b c h w -> b w h c"), self.qkv_local_v), "b w h c -> b c h w"),
        )

    def _along(self, strips: torch.Tensor, qkv: nn.Linear) -> torch.Tensor:
        """[B, strips, pixels, C/2] → the same shape."""
        query, key, value = rearrange(qkv(strips), "b s n (qkv m d) -> qkv (b s) m n d", qkv=3, m=self.heads)
        out = F.scaled_dot_product_attention(query, key, value)
        return rearrange(out, "(b s) m n d -> b s n (m d)", b=strips.shape[0])


class InterSA(StripBlock):
    """Inter-strip attention: the rows, each with all its pixels one vector, attend to each other; so do the columns."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(channels, heads)
        self.conv_h = nn.Conv2d(channels // 2, 3 * (channels // 2), 1)
        self.conv_v = nn.Conv2d(channels // 2, 3 * (channels // 2), 1)

    def attend(self, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        width, height = rows.shape[-1], columns.shape[-2]
        query, key, value = rearrange(self.conv_h(rows), "b (qkv m d) h w -> qkv b m h (d w)", qkv=3, m=self.heads)
        across = _between(query, key, value)
        query, key, value = rearrange(self.conv_v(columns), "b (qkv m d) h w -> qkv b m w (d h)", qkv=3, m=self.heads)
        down = _between(query, key, value)
        return (
            rearrange(across, "b m h (d w) -> b (m d) h w", w=width),
            rearrange(down, "b m w (d h) -> b (m d) h w", h=height),
        )


def _between(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of few vectors that are thousands of numbers long, [B, heads, strips, d]: written out, as the fused
    kernels are slower on them (CPU, forward + backward: 1.3 to 1.6 times) or do not take them (GPU: d over 256)."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ value


def strip_block(number: int, channels: int, heads: int) -> StripBlock:
    """The blocks alternate, beginning with 1: intra, inter, intra, …"""
    return (InterSA, IntraSA)[number % 2](channels, heads)


class Encoder(nn.Module):
    """[B, 3, H, W] → features [B, 320, H/4, W/4] and the skips [B, 128, H/2, W/2], [B, 64, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.en_layer1_1 = conv_act(3, 64)
        self.en_layer1_2, self.en_layer1_3, self.en_layer1_4 = (ResidualUnit(64) for _ in range(3))
        self.en_layer2_1 = conv_act(64, 128, stride=2)
        self.en_layer2_2, self.en_layer2_3, self.en_layer2_4 = (ResidualUnit(128) for _ in range(3))
        self.en_layer3_1 = conv_act(128, 320, stride=2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        full = self.en_layer1_1(x)
        full = self.en_layer1_4(self.en_layer1_3(self.en_layer1_2(full)))
        half = self.en_layer2_1(full)
        half = self.en_layer2_4(self.en_layer2_3(self.en_layer2_2(half)))
        return self.en_layer3_1(half), half, full


class Decoder(nn.Module):
    """The encoder's features and skips → a correction to the image, [B, 3, H, W]."""

    def __init__(self, heads: int, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.de_layer3_1 = up_act(320, 192)
        self.de_layer2_2 = conv_act(192 + 128, 192, 1)
        for number in range(1, blocks + 1):
            self.add_module(f"de_block_{number}", strip_block(number, 192, heads))
        self.de_layer2_1 = up_act(192, 64)
        self.de_layer1_3 = two_convs(128, 64, 1)
        self.de_layer1_2 = ResidualUnit(64)
        self.de_layer1_1 = conv_act(64, 3)

    def forward(self, x: torch.Tensor, half: torch.Tensor, full: torch.Tensor, embed: Embed) -> torch.Tensor:
        x = self.de_layer2_2(torch.cat([self.de_layer3_1(x), half], dim=1))
        x = embed("decoder2", x)
        for number in range(1, self.blocks + 1):
            x = self.get_submodule(f"de_block_{number}")(x)
        x = self.de_layer2_1(x)
        x = act(x + self.de_layer1_3(torch.cat([x, full], dim=1)))
        return self.de_layer1_1(self.de_layer1_2(x))


class Stripformer(nn.Module):
    """Blurry [B, 3, H, W] → (restored [B, 3, H, W],), sRGB, nominally in [0, 1]; H, W multiples of 4.

    Strip attention sees blur's direction and extent along rows and columns at a cost of B·H·W·(H + W). The official
    network takes and returns images in [−0.5, 0.5]: its scripts take GREY off and add it again, here the network does.
    blocks: strip blocks at stride 4 (12 in the paper) and in the decoder at stride 2 (6). Defaults: 19.7 M parameters.
    Norms are over the channels of a pixel.

    Embed points: `bottleneck` (320 channels, stride 4), before the first strip block, and `decoder2` (192, 2), before
    the decoder's. State-dict names are the official release's.
    """

    def __init__(self, blocks: tuple[int, int] = (12, 6), heads: tuple[int, int] = (5, 3)) -> None:
        super().__init__()
        blocks, heads = tuple(blocks), tuple(heads)
        if len(blocks) != 2 or len(heads) != 2 or min(blocks) < 0 or 160 % heads[0] or 96 % heads[1]:
            raise ValueError(
                f"Stripformer needs two counts of blocks ≥ 0 and two of heads, which divide 160 and 96; got blocks "
                f"{blocks}, heads {heads}"
            )
        self.blocks = blocks[0]
        self.encoder = Encoder()
        for number in range(1, blocks[0] + 1):
            self.add_module(f"Trans_block_{number}", strip_block(number, 320, heads[0]))
        self.decoder = Decoder(heads[1], blocks[1])
        self.stride_multiple = 4
        self.embed_points = {"bottleneck": (320, 4), "decoder2": (192, 2)}

    def forward(self, x: torch.Tensor, embed: Embed = identity) -> tuple[torch.Tensor, ...]:
        feature, half, full = self.encoder(x - GREY)
        feature = embed("bottleneck", feature)
        for number in range(1, self.blocks + 1):
            feature = self.get_submodule(f"Trans_block_{number}")(feature)
        return (x + self.decoder(feature, half, full, embed),)
