"""Deblurring datasets as they are released: where each keeps its pairs, matched by name, counted.

Every lister returns `PairFiles` in a fixed order and fails on a missing partner. Layouts and counts: GoPro (Nah et al.,
CVPR 2017), HIDE (Shen et al., ICCV 2019), RealBlur (Rim et al., ECCV 2020), REDS (Nah et al., CVPRW 2019), RSBlur (Rim
et al., ECCV 2022); re-packs as MPRNet, Restormer, NAFNet and MIMO-UNet distribute them.
"""

import os
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import DataError
from data.files import files_below
from data.formats import is_image, is_junk
from data.prepare.scenes import Scene, folder_above, hide_scene, own_scene
from data.shards.names import BLURRY, ROLES, SHARP
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
    none where it was never released as a whole. tested: the split that papers report. scene: see data.prepare.scenes.
    """

    list_pairs: Callable[[Path, str, str], list[PairFiles]]
    help: str
    splits: tuple[str, ...] = ("train", "val", "test")
    variants: tuple[str, ...] = ("",)
    counts: dict[str, int] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    licence: str = "the user's"
    tested: str = "test"
    scene: Scene = own_scene


def key_of(path: Path | str) -> str:
    """A shard key [0-9a-z_]+ from a path; where letters were lost, a crc32 of the path keeps keys apart.

    Of a long path the end is kept: the picture's own name and number stand there.
    """
    text = str(path)
    key = re.sub(r"[^0-9a-z]+", "_", text.lower()).strip("_")
    if key != re.sub(r"[/.\-]", "_", text) or len(key) > _KEY_ROOM or not key:
        key = f"{key[-(_KEY_ROOM - 9) :]}_{zlib.crc32(os.fsencode(text)):08x}".lstrip("_")
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
    found = (p for p in folder.iterdir() if is_image(p.name) and not is_junk(p.name) and p.is_file())
    return sorted(found, key=lambda path: _in_order(path.name))


def images_below(folder: Path) -> list[Path]:
    """Image files of a folder and of those in it, by path, numbers in it as numbers; not what systems leave behind."""
    found = ((str(p.relative_to(folder)), p) for p in files_below(folder) if is_image(p.name))
    return [p for name, p in sorted(found, key=lambda each: _in_order(each[0])) if not is_junk(name)]


def _in_order(text: str) -> list[tuple[int, int, str]]:
    """Sort key by name with its numbers as numbers: frame2 comes before frame10."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", text) if part]


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


def _kinds_in(folder: Path) -> list[tuple[str, str]]:
    """The names of folders of pairs, (blurry, sharp), that stand in a folder."""
    return [kind for kind in _PAIR_FOLDERS if all((folder / name).is_dir() for name in kind)]


def _pairs(root: Path, split: str, variant: str) -> list[PairFiles]:
    base = _folder(root, split)
    kinds = _kinds_in(base)
    if not kinds:
        names = ", ".join(f"{b}/ with {s}/" for b, s in _PAIR_FOLDERS)
        raise DataError(f"{base}: no folders of pairs here, such as {names}; name them with --blurry and --sharp")
    if len(kinds) > 1:
        names = " and ".join(f"{b}/ with {s}/" for b, s in kinds)
        raise DataError(f"{base}: has {names}; say which are meant with --blurry and --sharp")
    return pairs_in_folders(base, *kinds[0], root=root)


def pairs_in_folders(base: Path, blurry_name: str, sharp_name: str, *, root: Path) -> list[PairFiles]:
    """Pairs of two folders in `base`, nested alike, matched by path, or by path without the suffix. DataError for a
    picture without its partner."""
    blurry, sharp = _need(base / blurry_name, "it was named --blurry"), _need(base / sharp_name, "it was named --sharp")
    files = images_below(sharp)
    by_stem: dict[str, list[Path]] = {}
    for path in files:
        by_stem.setdefault(str(path.relative_to(sharp).with_suffix("")), []).append(path)

    def partner(path: Path) -> Path:
        """The sharp file of the same name, else the one of the same stem."""
        name = path.relative_to(blurry)
        if (sharp / name).is_file():
            return sharp / name
        found = by_stem.get(str(name.with_suffix("")), [sharp / name])
        if len(found) > 1:
            raise DataError(f"{path}: {len(found)} sharp files have its name, {found[0]} first; keep one")
        return found[0]

    return _no_orphans(_match(images_below(blurry), partner, root), files)


def pairs_of_list(path: Path, root: Path) -> list[PairFiles]:
    """Pairs of a list file with lines `<sharp> <blurry>`, as RealBlur's are, paths below `root` and tabs between those
    with spaces. DataError for a line that is none, and where names say that the columns are swapped."""
    pairs = []
    for number, line in enumerate(_lines(path), 1):
        sign = next((sign for sign in "\t," if sign in line), None)
        fields = [field.strip() for field in line.split(sign)]
        if not line.strip():
            continue
        if len(fields) != 2:
            raise DataError(
                f"{path}:{number}: {len(fields)} paths, expected `<sharp> <blurry>` (or a tab between them)"
            )
        said = [
            {kind for part in Path(field).with_suffix("").parts if (kind := ROLES.get(part.lower()))}
            for field in fields
        ]
        if said == [{BLURRY}, {SHARP}]:
            raise DataError(f"{path}:{number}: {fields[0]} comes first and is blurry; expected `<sharp> <blurry>`")
        for name in fields:
            if not (root / name).resolve().is_relative_to(root.resolve()):
                raise DataError(f"{path}:{number}: {name} lies outside of {root}; give paths below it")
            if not (root / name).is_file():
                raise DataError(f"{root / name}: missing (line {number} of {path.name})")
        sharp, blurry = (root / os.path.relpath(root / name, root) for name in fields)
        pairs.append(PairFiles(key_of(blurry.relative_to(root).with_suffix("")), sharp, blurry))
    return pairs


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the list does not read ({error}); give a text file") from None


def other_layout(layout: str, root: Path) -> str:
    """What a folder looks like instead, as an end of an error's line; empty where nothing is seen."""
    inner = [root, *sorted(p for p in root.iterdir() if p.is_dir())] if root.is_dir() else []
    for folder in inner:
        if _kinds_in(folder) and (layout != "pairs" or folder != root):
            return f" (looks like folders of pairs: `sharpprior prepare pairs {folder}`)"
    for folder in inner:
        sequences = [p for p in folder.iterdir() if (p / "sharp").is_dir() and (p / "blur").is_dir()]
        if sequences and layout != "gopro":
            return f" (looks like GoPro as released: `sharpprior prepare gopro {folder.parent}`)"
    return ""


def _photographs(root: Path, split: str, variant: str) -> list[PairFiles]:
    base = _folder(_need(root, "a folder of photographs"), split)
    found = images_below(base)
    if base != root:
        splits = LAYOUTS["folder"].splits
        for path in images_below(root):
            if path.relative_to(root).parts[0] not in splits:
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
        scene=folder_above(1),
    ),
    "hide": Layout(
        _hide,
        "HIDE",
        ("train", "test"),
        ("all", "close-ups", "long-shot"),
        {"train": 6397, "test": 2025},
        parts=("close-ups", "long-shot"),
        licence="research only, see HIDE",
        scene=hide_scene,
    ),
    **{
        f"realblur-{camera.lower()}": Layout(
            _realblur(camera),
            f"RealBlur-{camera}",
            ("train", "test"),
            ("blur",),
            {"train": 3758, "test": 980},
            licence="see RealBlur",
            scene=folder_above(1),
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
        tested="val300",
        scene=folder_above(0),
    ),
    "rsblur": Layout(
        _rsblur,
        "RSBlur",
        variants=("real_blur", "avg65_img", "oracle_avg65_img"),
        counts={"train": 8878, "val": 1120, "test": 3360},
        licence="see RSBlur",
        scene=folder_above(2),
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
    if not root.is_dir():
        raise DataError(f"{root}: missing, or no folder; give the folder of {known.help}")
    try:
        pairs = known.list_pairs(root, split, variant)
    except DataError as error:
        raise DataError(f"{error}{other_layout(layout, root)}") from None
    if not pairs:
        raise DataError(
            f"{root}: no images of {known.help}, {split}, found; check the folder{other_layout(layout, root)}"
        )
    expected = known.counts.get(split) if variant not in known.parts else None
    if expected is not None and len(pairs) != expected and not partial:
        raise DataError(
            f"{root}: {len(pairs)} pairs of {layout} {split} where {expected} were released; unpack it again, "
            "or allow a part of it with --partial"
        )
    return with_own_keys(pairs)


def with_own_keys(pairs: list[PairFiles]) -> list[PairFiles]:
    """The same pairs; DataError where two of them have one key."""
    seen: dict[str, Path] = {}
    for pair in pairs:
        if pair.key in seen:
            raise DataError(f"{pair.files[-1]}: has the same key as {seen[pair.key]}; rename one of them")
        seen[pair.key] = pair.files[-1]
    return pairs
