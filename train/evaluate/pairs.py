"""The pairs that a model is tested on: of a data set as released, or of a shard set's validation list."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from data.blur import TIERS, BlurConfig
from data.errors import DataError
from data.image import decode_image
from data.prepare.layouts import LAYOUTS, PairFiles, list_dataset, pairs_in_folders, pairs_of_list, with_own_keys
from data.shards.set import ShardSet
from data.stream.crops import PAIRS_VERSION
from data.stream.pairs import PAIRED
from data.stream.validation import validation_count, validation_pairs
from train.evaluate.scores import VALIDATION_SEED
from train.evaluate.yardsticks import known_kernel

UNSPLIT = "no split"  # of folders of pairs that have none


class Item(NamedTuple):
    """One pair that will be tested: its key, the scene that it resembles others of, its tier ("" where only its input
    PSNR will tell), its place in the list, and a stamp of its files: one that was mended or replaced has another."""

    key: str
    scene: str
    tier: str
    number: int
    stamp: str = ""


class Pair(NamedTuple):
    """blurry, sharp: uint8 [3, H, W]; extent of the blur in px, NaN where it is not known; the kernel [k, k] where the
    blur is one kernel everywhere, and known; content: a digest of the files
    that were read ("" of a set with its own)."""

    blurry: torch.Tensor
    sharp: torch.Tensor
    extent: float
    kernel: np.ndarray | None
    content: str = ""


class PairSet(Protocol):
    """What is tested on. label: short, for folders; facts: for reports; digest: of the pairs, whatever their place;
    whole: crops that go through the network in one piece, however much memory there is; aligned: RealBlur's protocol.
    read raises DataError for a pair that cannot be read. content: a digest of a pair's files, "" where they do not read
    or `digest` is of their content already."""

    label: str
    facts: dict[str, object]
    digest: str
    items: list[Item]
    whole: bool
    aligned: bool

    def read(self, item: Item) -> Pair: ...

    def content(self, item: Item) -> str: ...


class RecordedPairs:
    """Full pictures of a data set as released, or of any folders of pairs.

    folders: names of the blurry and the sharp folder, of layout pairs; pairs_list: a file of lines `<sharp> <blurry>`.
    max_pairs: of so many, drawn by `fair_draw`. DataError as `list_dataset`.
    """

    whole = False

    def __init__(
        self,
        layout: str,
        root: Path,
        *,
        split: str | None = None,
        variant: str | None = None,
        partial: bool = False,
        folders: tuple[str, str] | None = None,
        pairs_list: Path | None = None,
        max_pairs: int | None = None,
    ) -> None:
        known, root = LAYOUTS[layout], Path(root).expanduser()
        if (folders or pairs_list) and layout != "pairs":
            raise DataError(f"{layout}: has its own folders and lists; --blurry, --sharp and --list are of pairs:PATH")
        if layout == "pairs":
            _check_folders(root, split, variant, folders, pairs_list)
        split, variant = split or known.tested, known.variants[0] if variant is None else variant
        if pairs_list is not None:
            pairs, split = with_own_keys(pairs_of_list(pairs_list, root)), pairs_list.name
        elif folders is not None:
            base = root / split if (root / split).is_dir() else root
            pairs = with_own_keys(pairs_in_folders(base, *folders, root=root))
            split = split if base != root else UNSPLIT
        else:
            pairs = list_dataset(layout, root, split=split, variant=variant, partial=partial)
            split = split if layout != "pairs" or (root / split).is_dir() else UNSPLIT
        if not pairs:
            raise DataError(f"{root}: no pairs here; check --blurry, --sharp and --list")
        self._files = pairs
        scenes = [known.scene(pair.files[-1], pair.key) for pair in pairs]
        if layout == "pairs" and len(set(scenes)) == 1:  # one folder of unrelated pictures
            scenes = [pair.key for pair in pairs]
        chosen = fair_draw([pair.key for pair in pairs], scenes, max_pairs)
        self.items = [Item(pairs[n].key, scenes[n], "", n, _stamp(pairs[n])) for n in chosen]
        self.aligned = layout.startswith("realblur-")
        name = f"pairs-{root.resolve().name}" if layout == "pairs" else layout
        self.label = "-".join(filter(None, (name, split if split != UNSPLIT else "", variant)))
        self.digest = _digest([layout, split, variant, *(pairs[n].key for n in chosen)])
        self.facts = {
            "set": known.help if layout != "pairs" else f"pairs in {root.resolve().name}",
            "layout": layout,
            "split": split,
            "blur variant": variant or "as recorded",
            "path": str(root),
            "pairs": len(chosen),
            "of": len(pairs),
            "released": known.counts.get(split) if variant not in known.parts else None,
            "scenes": len({item.scene for item in self.items}),
            "scenes unknown": sum(item.scene == item.key for item in self.items),
            "licence": known.licence,
        }

    def read(self, item: Item) -> Pair:
        """The two pictures, whole. DataError, naming the file, for one that does not read or does not match."""
        files = self._files[item.number]
        images, hashed = [], hashlib.blake2b(digest_size=16)
        for path in files.files:
            try:
                whole = path.read_bytes()
            except OSError as error:
                raise DataError(f"{path}: {error.strerror or error}") from None
            hashed.update(hashlib.blake2b(whole).digest())
            images.append(decode_image(whole, str(path)))
        sharp, blurry = (torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in images)
        if blurry.shape != sharp.shape:
            sizes = [f"{image.shape[1]}×{image.shape[0]}" for image in images]
            raise DataError(f"{files.blurry}: {sizes[1]} px, its sharp partner {sizes[0]}; a pair must match")
        return Pair(blurry, sharp, math.nan, None, hashed.hexdigest())

    def content(self, item: Item) -> str:
        """A digest of the two files as they are now, as `read` gives it; "" where they do not read."""
        hashed = hashlib.blake2b(digest_size=16)
        try:
            for path in self._files[item.number].files:
                hashed.update(hashlib.blake2b(path.read_bytes()).digest())
        except OSError:
            return ""
        return hashed.hexdigest()


class ValidationPairs:
    """Crops of a shard set, the list that training evaluates on: every photograph × crop × severity tier.

    max_pairs: of so many pairs at most; photographs and crops are drawn, each with all its tiers.
    """

    whole, aligned = True, False

    def __init__(
        self,
        shards: ShardSet,
        blur: BlurConfig,
        *,
        label: str,
        crop: int,
        per_tier: int,
        margin: int,
        max_pairs: int | None = None,
    ) -> None:
        self._shards, self._blur, self._crops = shards, blur, per_tier
        self._how = {"crop": crop, "margin": margin, "seed": VALIDATION_SEED, "crops": per_tier}
        tiers = (PAIRED,) if shards.kind == "pairs" else TIERS
        self._count = validation_count(shards, TIERS, per_tier)
        keys = [f"{shards.key(n)}/{crop_number}" for n in range(len(shards)) for crop_number in range(per_tier)]
        scenes = [_photograph(shards, n) for n in range(len(shards)) for _ in range(per_tier)]
        if max_pairs is not None and max_pairs < len(tiers):
            raise DataError(f"--max-pairs {max_pairs}: at least {len(tiers)}, one of every severity tier")
        slots = fair_draw(keys, scenes, max_pairs and max_pairs // len(tiers))
        self.items = [
            Item(f"{keys[slot]}/{tier}", scenes[slot], tier, slot * len(tiers) + place)
            for slot in slots
            for place, tier in enumerate(tiers)
        ]
        settings = blur.model_dump(mode="json", exclude={"device"})
        self.digest = _digest([shards.digest, json.dumps([settings, self._how, PAIRS_VERSION], sort_keys=True), *keys])
        self.label = label
        recorded, name = shards.kind == "pairs", shards.info.get("name") or Path(shards.location.rstrip("/")).name
        self.facts = {
            "set": f"validation crops of {name}",
            "layout": "shards",
            "split": "validation list",
            "blur variant": "as recorded" if recorded else f"synthesized: {_preset(blur)}",
            "path": str(shards.location),
            "pairs": len(self.items),
            "of": self._count,
            "released": None,
            "scenes": len({scenes[slot] for slot in slots}),
            "crop": crop,
            "licence": str(shards.info.get("licence", "the user's")),
        }

    def read(self, item: Item) -> Pair:
        """The pair at a place of the validation list. DataError where its photograph does not read."""
        place = {"rank": item.number, "world": self._count}
        pair = next(validation_pairs(self._shards, self._blur, **self._how, **place))
        return Pair(pair["blurry"], pair["sharp"], float(pair["extent"]), known_kernel(pair))

    def content(self, item: Item) -> str:
        """Nothing: the set's digest is of its content."""
        return ""


def _check_folders(
    root: Path, split: str | None, variant: str | None, folders: tuple[str, str] | None, pairs_list: Path | None
) -> None:
    """DataError for what folders of pairs have none of: reports would name it nevertheless."""
    if variant:
        raise DataError(f"--variant {variant}: pairs have no variants: name the blurry folder with --blurry")
    if pairs_list is not None and folders is not None:
        raise DataError("--list and --blurry with --sharp: each names all pairs: give one of them")
    if pairs_list is not None and split:
        raise DataError(f"--split {split}: the pairs are those of --list: leave it out, or name the split's own list")
    if split and root.is_dir() and not (root / split).is_dir():
        raise DataError(f"--split {split}: no folder {root / split}: leave it out for the pairs in {root}")


def fair_draw(keys: Sequence[str], scenes: Sequence[str], count: int | None) -> list[int]:
    """Places of `count` of the pictures (None: of all), in their order, spread over the scenes in proportion.

    Systematic sampling by hashes of names: a scene with the share p of all pictures gets p·count of them, give or
    take one; which ones depends on no order and on no generator, and a larger count only adds to a smaller one.
    """
    if count is None or count >= len(keys):
        return list(range(len(keys)))
    if count < 1:
        raise DataError(f"--max-pairs {count}: at least 1")
    members: dict[str, list[int]] = defaultdict(list)
    for place, scene in enumerate(scenes):
        members[scene].append(place)
    queue = []
    for scene, places in members.items():
        offset = _fraction(scene)
        for turn, place in enumerate(sorted(places, key=lambda place: (_fraction(keys[place]), keys[place]))):
            queue.append(((turn + offset) / len(places), keys[place], place))
    return sorted(place for _, _, place in sorted(queue)[:count])


def _fraction(name: str) -> float:
    """A number in [0, 1) by a name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big") / 2**48


def _digest(lines: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(map(str, lines)).encode(), digest_size=16).hexdigest()


def _stamp(pair: PairFiles) -> str:
    """Sizes and dates: where they are the same, so is the content; where not, the content tells."""
    try:
        return " ".join(f"{found.st_size} {found.st_mtime_ns}" for path in pair.files for found in [path.stat()])
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None


def _photograph(shards: ShardSet, number: int) -> str:
    """The photograph that a sample was cut from, where the set's maker said so; else the sample."""
    if "json" in shards.extensions(number):
        try:
            facts = json.loads(shards.read(number, "json"))
        except (DataError, OSError, ValueError):
            facts = None  # the pixels may be sound; others' files hold what they like
        for name in ("photograph", "source", "file"):
            if isinstance(facts, dict) and isinstance(facts.get(name), str) and "box" in facts:
                return facts[name]
    return shards.key(number)


def _preset(blur: BlurConfig) -> str:
    """The preset's name, and a digest of all settings, which may override it."""
    text = json.dumps(blur.model_dump(mode="json", exclude={"device"}), sort_keys=True)
    return f"{blur.preset} ({_digest([text])[:8]})"
