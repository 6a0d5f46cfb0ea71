"""MPRNet (Zamir et al., "Multi-Stage Progressive Image Restoration", CVPR 2021)."""

import torch
from einops import rearrange
from torch import nn

from model.backbones.points import Embed, identity

Levels = list[torch.Tensor]  # features at strides 1, 2, 4 of a stage's UNet


def conv(inputs: int, outputs: int, size: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=bias)


class CALayer(nn.Module):
    """Channel attention: [B, C, h, w] times gates [B, C, 1, 1] from its own mean over the pixels."""

    def __init__(self, channels: int, reduction: int, bias: bool) -> None:
        super().__init__()
        inner = channels // reduction
        self.conv_du = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=bias), nn.ReLU(), nn.Conv2d(inner, channels, 1, bias=bias), nn.Sigmoid()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.conv_du(x.mean(dim=(2, 3), keepdim=True))


class CAB(nn.Module):
    """Channel attention block: x + CA(conv(PReLU(conv(x)))), [B, C, h, w]."""

    def __init__(self, channels: int, make: "Make") -> None:
        super().__init__()
        self.CA = CALayer(channels, make.reduction, make.bias)
        self.body = nn.Sequential(make.conv(channels, channels), make.act, make.conv(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.CA(self.body(x))


class Make:
    """What all blocks of one network share: their settings, and ONE PReLU, whose slope is a single parameter that the
    state dict holds under every block's name, as in the official release."""

    def __init__(self, kernel_size: int, reduction: int, bias: bool) -> None:
        self.kernel_size, self.reduction, self.bias = kernel_size, reduction, bias
        self.act = nn.PReLU()

    def conv(self, inputs: int, outputs: int) -> nn.Conv2d:
        return conv(inputs, outputs, self.kernel_size, self.bias)

    def cabs(self, channels: int, count: int) -> nn.Sequential:
        return nn.Sequential(*(CAB(channels, self) for _ in range(count)))


class DownSample(nn.Module):
    """[B, C, h, w] → [B, C + more, h/2, w/2]."""

    def __init__(self, channels: int, more: int) -> None:
        super().__init__()
        halve = nn.Upsample(scale_factor=0.5, mode="bilinear", align_corners=False)
        self.down = nn.Sequential(halve, conv(channels, channels + more, 1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(x)


class UpSample(nn.Module):
    """[B, C + more, h, w] → [B, C, 2h, 2w], plus a skip where one is given."""

    def __init__(self, channels: int, more: int) -> None:
        super().__init__()
        double = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.up = nn.Sequential(double, conv(channels + more, channels, 1, bias=False))

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        x = self.up(x)
        return x if skip is None else x + skip


class SAM(nn.Module):
    """Supervised attention: a stage's features [B, C, h, w] and its input image → gated features, the stage's output.

    The output is supervised, and gates which features the next stage is given.
    """

    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        self.conv1 = conv(channels, channels, 1, bias)
        self.conv2 = conv(channels, 3, 1, bias)
        self.conv3 = conv(3, channels, 1, bias)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        restored = self.conv2(x) + image
        return x + self.conv1(x) * torch.sigmoid(self.conv3(restored)), restored


class Encoder(nn.Module):
    """[B, C, h, w] → features at strides 1, 2, 4 with C, C + more, C + 2·more channels.

    csff: cross-stage feature fusion; each level also takes in the previous stage's encoder and decoder features of it.
    """

    def __init__(self, channels: int, more: int, make: Make, csff: bool) -> None:
        super().__init__()
        widths = [channels + level * more for level in range(3)]
        self.encoder_level1, self.encoder_level2, self.encoder_level3 = (make.cabs(width, 2) for width in widths)
        self.down12 = DownSample(widths[0], more)
        self.down23 = DownSample(widths[1], more)
        if csff:
            self.csff_enc1, self.csff_enc2, self.csff_enc3 = (conv(width, width, 1, make.bias) for width in widths)
            self.csff_dec1, self.csff_dec2, self.csff_dec3 = (conv(width, width, 1, make.bias) for width in widths)

    def forward(self, x: torch.Tensor, before: tuple[Levels, Levels] | None = None) -> Levels:
        first = self.encoder_level1(x)
        if before is not None:
            first = first + self.csff_enc1(before[0][0]) + self.csff_dec1(before[1][0])
        second = self.encoder_level2(self.down12(first))
        if before is not None:
            second = second + self.csff_enc2(before[0][1]) + self.csff_dec2(before[1][1])
        third = self.encoder_level3(self.down23(second))
        if before is not None:
            third = third + self.csff_enc3(before[0][2]) + self.csff_dec3(before[1][2])
        return [first, second, third]


class Decoder(nn.Module):
    """The encoder's features → as many of the same shapes, from the deepest up, skips through a CAB."""

    def __init__(self, channels: int, more: int, make: Make) -> None:
        super().__init__()
        widths = [channels + level * more for level in range(3)]
        self.decoder_level1, self.decoder_level2, self.decoder_level3 = (make.cabs(width, 2) for width in widths)
        self.skip_attn1, self.skip_attn2 = CAB(widths[0], make), CAB(widths[1], make)
        self.up21 = UpSample(widths[0], more)
        self.up32 = UpSample(widths[1], more)

    def forward(self, levels: Levels, embed: Embed = identity) -> Levels:
        third = self.decoder_level3(levels[2])
        second = self.decoder_level2(embed("decoder2", self.up32(third, self.skip_attn2(levels[1]))))
        first = self.decoder_level1(self.up21(second, self.skip_attn1(levels[0])))
        return [first, second, third]


class ORB(nn.Module):
    """Original-resolution block: x + conv(`count` CABs of x)."""

    def __init__(self, channels: int, count: int, make: Make) -> None:
        super().__init__()
        self.body = make.cabs(channels, count).append(make.conv(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class ORSNet(nn.Module):
    """Original-resolution subnetwork: three ORBs, each given a level of the previous stage's UNet, brought to size."""

    def __init__(self, channels: int, more_unet: int, more: int, num_cab: int, make: Make) -> None:
        super().__init__()
        width = channels + more
        self.orb1, self.orb2, self.orb3 = (ORB(width, num_cab, make) for _ in range(3))
        self.up_enc1, self.up_dec1 = (UpSample(channels, more_unet) for _ in range(2))
        self.up_enc2, self.up_dec2 = (
            nn.Sequential(UpSample(channels + more_unet, more_unet), UpSample(channels, more_unet)) for _ in range(2)
        )
        self.conv_enc1, self.conv_enc2, self.conv_enc3 = (conv(channels, width, 1, make.bias) for _ in range(3))
        self.conv_dec1, self.conv_dec2, self.conv_dec3 = (conv(channels, width, 1, make.bias) for _ in range(3))

    def forward(self, x: torch.Tensor, encoded: Levels, decoded: Levels) -> torch.Tensor:
        x = self.orb1(x) + self.conv_enc1(encoded[0]) + self.conv_dec1(decoded[0])
        x = self.orb2(x) + self.conv_enc2(self.up_enc1(encoded[1])) + self.conv_dec2(self.up_dec1(decoded[1]))
        return self.orb3(x) + self.conv_enc3(self.up_enc2(encoded[2])) + self.conv_dec3(self.up_dec2(decoded[2]))


def split(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[B, C, rows·h, columns·w] → its patches side by side in the batch, [rows·columns·B, C, h, w]."""
    return rearrange(x, "b c (rows h) (columns w) -> (rows columns b) c h w", rows=rows, columns=columns)


def join(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `split`."""
    return rearrange(x, "(rows columns b) c h w -> b c (rows h) (columns w)", rows=rows, columns=columns)


def halves_of_quarters(x: torch.Tensor) -> torch.Tensor:
    """split(image, 2, 2) → split(image, 2, 1): left and right quarters become the top half and the bottom half."""
    return rearrange(x, "(rows columns b) c h w -> (rows b) c h (columns w)", rows=2, columns=2)


class MPRNet(nn.Module):
    """Blurry [B, 3, H, W] → restored by stage 1, 2 and 3, all full-size; H, W multiples of 8.

    sRGB, nominally in [0, 1]. The official network returns stage 3 first; here the best comes LAST, as of every
    backbone. Multi-patch hierarchy: stage 1's encoder sees the four quarters of the image and its decoder the two
    halves, stage 2's encoder the halves and its decoder the whole, stage 3 the whole, at full resolution throughout.
    Patches run side by side as one batch; what is averaged over pixels (channel attention) is averaged over a patch.
    Defaults are those of the paper for deblurring: 20.1 M parameters.

    Embed points: `bottleneck` (n_feat + 2·scale_unetfeats channels, stride 4), stage 2's deepest encoder features after
    the halves are joined, and `decoder2` (n_feat + scale_unetfeats, 2), before the second level of its decoder. These
    are the first features of the whole image, and the only reduced ones of it: stage 1 sees patches, across which
    semantic attention would have to be cut, and stage 3 has full resolution only, but reads both points' features.
    State-dict names are the official release's.
    """

    def __init__(
        self,
        n_feat: int = 96,
        scale_unetfeats: int = 48,
        scale_orsnetfeats: int = 32,
        num_cab: int = 8,
        kernel_size: int = 3,
        reduction: int = 4,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if min(n_feat, scale_unetfeats, num_cab, kernel_size) < 1 or kernel_size % 2 == 0 or n_feat < reduction:
            raise ValueError(
                "MPRNet needs n_feat ≥ reduction, scale_unetfeats and num_cab ≥ 1, and an odd kernel_size; got n_feat "
                f"{n_feat}, reduction {reduction}, scale_unetfeats {scale_unetfeats}, num_cab {num_cab}, kernel_size "
                f"{kernel_size}"
            )
        make = Make(kernel_size, reduction, bias)
        self.shallow_feat1, self.shallow_feat2, self.shallow_feat3 = (
            nn.Sequential(make.conv(3, n_feat), CAB(n_feat, make)) for _ in range(3)
        )
        self.stage1_encoder = Encoder(n_feat, scale_unetfeats, make, csff=False)
        self.stage1_decoder = Decoder(n_feat, scale_unetfeats, make)
        self.stage2_encoder = Encoder(n_feat, scale_unetfeats, make, csff=True)
        self.stage2_decoder = Decoder(n_feat, scale_unetfeats, make)
        self.stage3_orsnet = ORSNet(n_feat, scale_unetfeats, scale_orsnetfeats, num_cab, make)
        self.sam12, self.sam23 = SAM(n_feat, bias), SAM(n_feat, bias)
        self.concat12 = make.conv(2 * n_feat, n_feat)
        self.concat23 = make.conv(2 * n_feat, n_feat + scale_orsnetfeats)
        self.tail = make.conv(n_feat + scale_orsnetfeats, 3)
        self.stride_multiple = 8
        self.embed_points = {
            "bottleneck": (n_feat + 2 * scale_unetfeats, 4),
            "decoder2": (n_feat + scale_unetfeats, 2),
        }

    def forward(self, x: torch.Tensor, embed: Embed = identity) -> tuple[torch.Tensor, ...]:
        halves, quarters = split(x, 2, 1), split(x, 2, 2)

        encoded = self.stage1_encoder(self.shallow_feat1(quarters))
        encoded1 = [halves_of_quarters(level) for level in encoded]
        decoded1 = self.stage1_decoder(encoded1)
        gated, restored1 = self.sam12(decoded1[0], halves)

        feature = self.concat12(torch.cat([self.shallow_feat2(halves), gated], dim=1))
        encoded2 = [join(level, 2, 1) for level in self.stage2_encoder(feature, (encoded1, decoded1))]
        encoded2[2] = embed("bottleneck", encoded2[2])
        decoded2 = self.stage2_decoder(encoded2, embed)
        gated, restored2 = self.sam23(decoded2[0], x)

        feature = self.concat23(torch.cat([self.shallow_feat3(x), gated], dim=1))
        restored3 = x + self.tail(self.stage3_orsnet(feature, encoded2, decoded2))
        return join(restored1, 2, 1), restored2, restored3
