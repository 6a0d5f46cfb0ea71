"""Deblurring datasets as they are released: where each keeps its pairs, matched by name, counted.

Every lister returns `PairFiles` in a fixed order and fails on a missing partner. Layouts and counts: GoPro (Nah et al.,
CVPR 2017), HIDE (Shen et al., ICCV 2019), RealBlur (Rim et al., ECCV 2020), REDS (Nah et al., CVPRW 2019), RSBlur (Rim
et al., ECCV 2022); re-packs as MPRNet, Restormer, NAFNet and MIMO-UNet distribute them.
"""

import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import DataError
from data.formats import IMAGE_SUFFIXES
from data.shards.tar import MAX_KEY

_KEY_ROOM = MAX_KEY - 16  # tile numbers and a prefix follow


@dataclass(frozen=True)
class PairFiles:
    """One recorded pair: its key and the two files. `blurry` is None in a list of sharp photographs."""

    key: str
    sharp: Path
    blurry: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that exist: (sharp, blurry) or (sharp,)."""
        return (self.sharp,) if self.blurry is None else (self.sharp, self.blurry)


@dataclass(frozen=True)
class Layout:
    """A dataset as released. list_pairs(root, split, variant); help: what it is, for the command line.

    splits, variants: names, the first the default; counts: pairs of a split, of every variant that is not in `parts`;
    none where it was never released as a whole.
    """

    list_pairs: Callable[[Path, str, str], list[PairFiles]]
    help: str
    splits: tuple[str, ...] = ("train", "val", "test")
    variants: tuple[str, ...] = ("",)
    counts: dict[str, int] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    licence: str = "the user's"


def key_of(path: Path | str) -> str:
    """A shard key [0-9a-z_]+ from a path; where letters were lost, a crc32 of the path keeps keys apart."""
    text = str(path)
    key = re.sub(r"[^0-9a-z]+", "_", text.lower()).strip("_")
    if key != re.sub(r"[/.\-]", "_", text) or len(key) > _KEY_ROOM or not key:
        key = f"{key[: _KEY_ROOM - 9]}_{zlib.crc32(text.encode()):08x}".lstrip("_")
    return key


def _folder(root: Path, *names: str) -> Path:
    """root, or root/<name> for the first name that is there: people give the dataset's folder or its parent."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    return root


def _need(folder: Path, what: str) -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder}: missing, {what}; give the dataset's folder as released, unpacked")
    return folder


def images_in(folder: Path) -> list[Path]:
    """Image files of a folder (not below it), by name, numbers in it as numbers."""
    found = (p for p in folder.iterdir() if p.suffix.lower().lstrip(".") in IMAGE_SUFFIXES and p.is_file())
    return sorted(found, key=_in_order)


def _in_order(path: Path) -> list[tuple[int, int, str]]:
    """Sort key by name with its numbers as numbers: frame2 comes before frame10."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", path.name) if part]


def _match(blurry: Iterable[Path], partner: Callable[[Path], Path], root: Path) -> list[PairFiles]:
    pairs = []
    for path in blurry:
        sharp = partner(path)
        if not sharp.is_file():
            raise DataError(f"{path}: its sharp partner {sharp} is missing; unpack the dataset again")
        pairs.append(PairFiles(key_of(path.relative_to(root).with_suffix("")), sharp, path))
    return pairs


def _no_orphans(pairs: Sequence[PairFiles], sharp: Iterable[Path]) -> list[PairFiles]:
    used = {pair.sharp for pair in pairs}
    for path in sharp:
        if path not in used:
            raise DataError(f"{path}: its blurry partner is missing; unpack the dataset again")
    return list(pairs)


def _gopro(root: Path, split: str, variant: str) -> list[PairFiles]:
    root = _folder(root, "GOPRO_Large")
    sequences = sorted(
        p for p in _need(root / split, f"GoPro keeps its {split} sequences there").iterdir() if p.is_dir()
    )
    pairs = []
    for sequence in sequences:
        sharp = _need(sequence / "sharp", "every GoPro sequence has sharp/")
        blurry = images_in(_need(sequence / variant, f"every GoPro sequence has {variant}/"))
        pairs += _no_orphans(_match(blurry, lambda p, sharp=sharp: sharp / p.name, root), images_in(sharp))
    return pairs


def _hide(root: Path, split: str, variant: str) -> list[PairFiles]:
    root = _folder(root, "HIDE_dataset", "HIDE")
    truth = _need(root / "GT", "HIDE keeps all sharp images in GT/")
    folders = (
        [root / "train"]
        if split == "train"
        else [root / "test" / f"test-{kind}" for kind in ("close-ups", "long-shot")]
    )
    if split == "test" and variant != "all":
        folders = [folder for folder in folders if folder.name == f"test-{variant}"]
    blurry = [p for folder in folders for p in images_in(_need(folder, "HIDE keeps blurry images there"))]
    return _match(blurry, lambda p: truth / p.name, root)


def _from_list(path: Path, root: Path, sharp_folder: str, blurry_folder: str) -> list[PairFiles]:
    """Pairs of a list file with lines `<sharp> <blurry>`, paths below `root`; a swapped column is an error."""
    if not path.is_file():
        raise DataError(f"{path}: the list file is missing; it comes with the dataset")
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2:
            raise DataError(f"{path}:{number}: {len(fields)} paths, expected `<sharp> <blurry>`")
        sharp, blurry = (Path(field) for field in fields)
        if sharp.parent.name != sharp_folder or blurry.parent.name != blurry_folder:
            raise DataError(
                f"{path}:{number}: expected …/{sharp_folder}/… first and …/{blurry_folder}/… second; restore the list"
            )
        for file in (sharp, blurry):
            if not (root / file).is_file():
                raise DataError(f"{root / file}: missing (line {number} of {path.name}); unpack the dataset again")
        pairs.append(PairFiles(key_of(blurry.with_suffix("")), root / sharp, root / blurry))
    return pairs


def _realblur(camera: str) -> Callable[[Path, str, str], list[PairFiles]]:
    def list_pairs(root: Path, split: str, variant: str) -> list[PairFiles]:
        root = _folder(root, "RealBlur")
        return _from_list(root / f"RealBlur_{camera}_{split}_list.txt", root, "gt", "blur")

    return list_pairs


def _reds(root: Path, split: str, variant: str) -> list[PairFiles]:
    root = _folder(root, "REDS")
    folder, name = ("val", "val") if split == "val300" else (split, split)
    root = _folder(root, folder)  # the archives unpack to train/train_sharp or to train_sharp
    blurry_root = _need(root / f"{name}_{variant}", f"REDS keeps the {variant} frames there")
    sharp_root = _need(root / f"{name}_sharp", "REDS keeps the sharp frames there")
    frames = [p for clip in sorted(blurry_root.iterdir()) if clip.is_dir() for p in images_in(clip)]
    if split == "val300":  # the field's subset: every tenth frame of the 30 clips
        frames = [p for p in frames if p.stem.endswith("9")]
    return _match(frames, lambda p: (sharp_root / p.parent.name / p.name).with_suffix(".png"), root)


def _rsblur(root: Path, split: str, variant: str) -> list[PairFiles]:
    lists = next(
        (p for p in (root / "datalist" / "RSBlur", root / "RSBlur" / "datalist" / "RSBlur") if p.is_dir()), None
    )
    if lists is None:
        raise DataError(f"{root}: no datalist/RSBlur/ here; put the lists of the RSBlur repository beside RSBlur/")
    base = lists.parent.parent
    base = base if (base / "RSBlur").is_dir() else base.parent
    pairs = _from_list(lists / f"RSBlur_real_{split}.txt", base, "gt", "real_blur")
    if variant == "real_blur":
        return pairs
    # Synthetic frames have lists of their own but stand beside the real ones: gt/, real_blur/, avg65_img/.
    return _match(
        [pair.sharp.parent.parent / variant / "avg_blur.png" for pair in pairs],
        lambda p: p.parent.parent / "gt" / "gt_sharp.png",
        base,
    )


_PAIR_FOLDERS = (("input", "target"), ("blur", "sharp"), ("blurry", "sharp"), ("lq", "gt"), ("blur", "gt"))


def _pairs(root: Path, split: str, variant: str) -> list[PairFiles]:
    base = _folder(root, split)
    for blurry_name, sharp_name in _PAIR_FOLDERS:
        blurry, sharp = base / blurry_name, base / sharp_name
        if blurry.is_dir() and sharp.is_dir():
            files = images_in(sharp)
            by_stem: dict[str, list[Path]] = {}
            for path in files:
                by_stem.setdefault(path.stem, []).append(path)

            def partner(path: Path, sharp: Path = sharp, names: dict[str, list[Path]] = by_stem) -> Path:
                """The sharp file of the same name, else the one of the same stem."""
                if (sharp / path.name).is_file():
                    return sharp / path.name
                found = names.get(path.stem, [sharp / path.name])
                if len(found) > 1:
                    raise DataError(f"{path}: {len(found)} sharp files have its name, {found[0]} first; keep one")
                return found[0]

            return _no_orphans(_match(images_in(blurry), partner, root), files)
    names = ", ".join(f"{b}/ with {s}/" for b, s in _PAIR_FOLDERS)
    raise DataError(f"{base}: no folders of pairs here; expected one of {names}")


def _photographs(root: Path, split: str, variant: str) -> list[PairFiles]:
    base = _folder(_need(root, "a folder of photographs"), split)
    found = sorted(p for p in base.rglob("*") if p.suffix.lower().lstrip(".") in IMAGE_SUFFIXES and p.is_file())
    if base != root:
        splits = LAYOUTS["folder"].splits
        for path in root.rglob("*"):
            beside = path.relative_to(root).parts[0] not in splits
            if beside and path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES and path.is_file():
                raise DataError(
                    f"{path}: lies beside the folder {split}/, which would be taken alone; name the one meant"
                )
    return [PairFiles(key_of(p.relative_to(base)), p) for p in found]  # a.jpg and a.png are two photographs


LAYOUTS = {
    "gopro": Layout(
        _gopro,
        "GOPRO_Large",
        ("train", "test"),
        ("blur", "blur_gamma"),
        {"train": 2103, "test": 1111},
        licence="CC BY 4.0",
    ),
    "hide": Layout(
        _hide,
        "HIDE",
        ("train", "test"),
        ("all", "close-ups", "long-shot"),
        {"train": 6397, "test": 2025},
        parts=("close-ups", "long-shot"),
        licence="research only, see HIDE",
    ),
    **{
        f"realblur-{camera.lower()}": Layout(
            _realblur(camera),
            f"RealBlur-{camera}",
            ("train", "test"),
            ("blur",),
            {"train": 3758, "test": 980},
            licence="see RealBlur",
        )
        for camera in "JR"
    },
    "reds": Layout(
        _reds,
        "REDS",
        ("train", "val", "val300"),
        ("blur", "blur_comp", "blur_jpeg"),
        {"train": 24000, "val": 3000, "val300": 300},
        licence="CC BY 4.0",
    ),
    "rsblur": Layout(
        _rsblur,
        "RSBlur",
        variants=("real_blur", "avg65_img", "oracle_avg65_img"),
        counts={"train": 8878, "val": 1120, "test": 3360},
        licence="see RSBlur",
    ),
    "pairs": Layout(_pairs, "folders of blurry and of sharp pictures"),
    "folder": Layout(_photographs, "sharp photographs, in folders of any depth"),
}


def list_dataset(
    layout: str, root: str | Path, *, split: str | None = None, variant: str | None = None, partial: bool = False
) -> list[PairFiles]:
    """The pairs (or photographs) of a dataset as released, in a fixed order; split and variant default to the first.

    `partial` accepts another number of pairs than was released. Raises DataError for an unknown layout, split or
    variant, a missing folder, list or partner, a wrong count, two files that would share a key, and for nothing found.
    """
    if layout not in LAYOUTS:
        raise DataError(f"dataset {layout!r}: unknown; one of {', '.join(LAYOUTS)}")
    known, root = LAYOUTS[layout], Path(root)
    split, variant = split or known.splits[0], known.variants[0] if variant is None else variant
    for name, value, allowed in (("split", split, known.splits), ("variant", variant, known.variants)):
        if value not in allowed:
            raise DataError(f"{layout}: {name} {value!r}; one of {', '.join(allowed)}")
    _need(root, f"the folder of {layout}")
    pairs = known.list_pairs(root, split, variant)
    if not pairs:
        raise DataError(f"{root}: no images of {layout} {split} found; check the folder")
    expected = known.counts.get(split) if variant not in known.parts else None
    if expected is not None and len(pairs) != expected and not partial:
        raise DataError(
            f"{root}: {len(pairs)} pairs of {layout} {split} where {expected} were released; unpack it again, "
            "or allow a part of it with --partial"
        )
    seen: dict[str, Path] = {}
    for pair in pairs:
        if pair.key in seen:
            raise DataError(f"{pair.files[-1]}: has the same key as {seen[pair.key]}; rename one of them")
        seen[pair.key] = pair.files[-1]
    return pairs
