"""Which crop of a photograph a visit takes: one of K boxes fixed for ever, so that cached features are found again."""

import math
from dataclasses import dataclass

from data.blur import TIERS, BlurConfig
from data.errors import DataError
from data.shards.set import ShardSet
from data.stream.order import derived_rng

# 2: recorded pairs keep no margin, others what the blur needs; seeds of later sources name the source.
PAIRS_VERSION = 2
SMALLEST_CROP = 32  # px, of data.crop and eval.crop


@dataclass(frozen=True)
class Crop:
    """A square crop: box `number` of the photograph's plan, top-left corner and size in px, mirrored or not."""

    number: int
    top: int
    left: int
    size: int
    flip: bool

    @property
    def box(self) -> tuple[int, int, int]:
        """(top, left, size) px."""
        return self.top, self.left, self.size


@dataclass(frozen=True)
class CropPlan:
    """K boxes of `size` px a photograph, `boxes=0` for a new box at every visit.

    Boxes keep `margin` px away from the photograph's edge as far as its size allows: blur reads light from beyond the
    crop, and what lies outside the photograph would have to be made up by reflection. Flip is part of the box.
    """

    size: int
    seed: int
    boxes: int
    margin: int

    def at(self, key: str, height: int, width: int, number: int) -> Crop:
        """Box `number` of the photograph `key` of height × width px; DataError where the photograph is smaller."""
        if height < self.size or width < self.size:
            raise DataError(
                f"sample {key}: {height}×{width} px is smaller than the crop of {self.size} px; lower the crop"
            )
        rng = derived_rng("box", self.seed, key, number)
        corner = []
        for side in (height, width):
            room = side - self.size
            edge = min(self.margin, room // 2)
            corner.append(int(rng.integers(edge, room - edge, endpoint=True)))
        return Crop(number, corner[0], corner[1], self.size, bool(rng.integers(2)))

    def visit(self, key: str, height: int, width: int, visit: int) -> Crop:
        """The crop of the photograph's `visit`-th visit: in every K visits all K boxes come once, shuffled."""
        if self.boxes == 0:
            return self.at(key, height, width, visit)
        turn, place = divmod(visit, self.boxes)
        number = int(derived_rng("turn", self.seed, key, turn).permutation(self.boxes)[place])
        return self.at(key, height, width, number)


def margin_of(shards: ShardSet, blur: BlurConfig, most: int) -> int:
    """Px that crops of a set keep from the edge, at most `most`: half the largest extent that the blur's tiers have;
    none where the blur is recorded, as nothing beyond the crop is read then and every pixel is worth learning from."""
    if shards.kind == "pairs":
        return 0
    drawn = [getattr(blur.tiers, tier) for tier in TIERS if tier != "identity"]
    return min(most, math.ceil(max((tier.extent[1] for tier in drawn if tier.share > 0), default=0) / 2))


def check_crop_fits(shards: ShardSet, crop: int, setting: str = "data.crop") -> None:
    """DataError naming the first sample that is smaller than the crop that `setting` asks for, and how many are."""
    small = [
        (shard, row, int(min(shard.heights[row], shard.widths[row])))
        for shard in shards.shards
        for row in ((shard.heights < crop) | (shard.widths < crop)).nonzero()[0]
    ]
    if small:
        shard, row, _ = small[0]
        least = min(side for *_, side in small)
        lower = f"lower {setting} to {least}, or " if least >= SMALLEST_CROP else ""
        raise DataError(
            f"{shards.location}/{shard.name}: sample {shard.keys[row]} of {shard.heights[row]}×{shard.widths[row]} px "
            f"is smaller than the crop of {crop} px ({len(small)} of {len(shards)} are): {lower}leave them out with "
            f"--min-size {crop} (of `sharpprior prepare`, or for others' shards of `sharpprior index --overwrite`), or "
            "prepare larger tiles (--tile 0: pictures stay whole)"
        )
