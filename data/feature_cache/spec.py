"""What a folder of the feature cache holds, and the names of its records."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from data.errors import DataError
from data.feature_cache.codec import DTYPES, Levels, payload_bytes

FORMAT, VERSION = "sharpprior-features", 2
KEY_BYTES = 16
OVERHEAD_BYTES = 48  # of a record beside its payload: key, crc32, its place in the file
META = "meta.json"


def crop_key(image: str, box: tuple[int, int, int], flip: bool) -> bytes:
    """16 bytes that name a crop: content id of the image (`ShardSet.image_id`), box (top, left, size) px, mirrored."""
    place = struct.pack("<3q?", *(int(number) for number in box), bool(flip))
    return hashlib.blake2b(place + image.encode(), digest_size=KEY_BYTES).digest()


def crop_keys(batch: Mapping[str, Any]) -> list[bytes]:
    """The keys of a loader batch's crops, from its `image`, `box` and `flip`."""
    crops = zip(batch["image"], batch["box"].tolist(), batch["flip"].tolist(), strict=True)
    return [crop_key(image, tuple(box), flip) for image, box, flip in crops]


@dataclass(frozen=True)
class CacheSpec:
    """What a folder of the cache holds: features of which teacher, levels (c, h, w), crop plan, and stored form.

    `teacher` is the teacher's fingerprint, `crops` the facts that decide which crops there are (JSON values), `dtype`
    "fp16" or "int8". Any difference is another fingerprint, hence another folder. Raises DataError.
    """

    teacher: str
    levels: Levels
    crops: dict
    dtype: str = "fp16"

    def __post_init__(self) -> None:
        levels = tuple(tuple(int(number) for number in level) for level in self.levels)
        object.__setattr__(self, "levels", levels)
        if self.dtype not in DTYPES:
            raise DataError(f"feature cache: dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if not levels or any(len(level) != 3 or min(level) < 1 for level in levels):
            raise DataError(f"feature cache: levels {levels}: give (channels, height, width), all ≥ 1, for each level")
        try:
            json.dumps(self.crops, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise DataError(f"feature cache: the crop plan's facts are no JSON ({error})") from None

    @property
    def meta(self) -> dict:
        """What meta.json says."""
        facts = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.loads(json.dumps(facts, sort_keys=True))

    @property
    def fingerprint(self) -> str:
        """32 hex digits of everything above and the format's version: the folder's name."""
        text = json.dumps(self.meta, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def payload_bytes(self) -> int:
        """Bytes of a crop's features in their stored form."""
        return payload_bytes(self.levels, self.dtype)

    @property
    def record_bytes(self) -> int:
        """Bytes that a crop takes on the disk, about."""
        return self.payload_bytes + OVERHEAD_BYTES

    @classmethod
    def from_meta(cls, meta: dict) -> CacheSpec:
        """The spec that a meta.json describes; DataError where it does not describe one of this version."""
        try:
            if (meta["format"], meta["version"]) != (FORMAT, VERSION):
                raise DataError(f"format {meta['format']} {meta['version']}, this version reads {FORMAT} {VERSION}")
            return cls(meta["teacher"], meta["levels"], meta["crops"], meta["dtype"])
        except (KeyError, TypeError) as error:
            raise DataError(f"not the meta.json of a feature cache ({error!r})") from None
