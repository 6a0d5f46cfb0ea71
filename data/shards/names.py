"""Which members of a tar are one sample, and which picture of a pair is the blurry one: read from their names.

Writers of shards agree on little. Pairs tell their pictures apart by what stands before the extension (`x.input.png`,
`x.target.png`), by folder (`blur/x.png`, `sharp/x.png`) or at an end of the name (`x_blur.png`, `x_sharp.png`); any
other picture is a sample of its own, under its path up to the last dot. Where two readings are possible (`x.jpg` beside
`x.mask.png`: a mask is no photograph) nothing is guessed: that is a problem, and its line names the way out.
"""

import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from data.errors import DataError
from data.formats import is_image, is_junk
from data.shards.tar import Member

SHARP, BLURRY, SKIP = "sharp", "blurry", "skip"
ROLES = {
    **dict.fromkeys(("sharp", "target", "gt", "groundtruth", "ground_truth", "clean", "hq", "hr", "sharp_gt"), SHARP),
    **dict.fromkeys(("blurry", "blur", "blurred", "input", "lq", "lr", "blur_gamma", "degraded"), BLURRY),
}
"""Names that the field's data sets give to the pictures of a pair."""


@dataclass
class Sample:
    """One sample: its key, its members by the extension under which the index lists them (jpg, sharp.png, …), and what
    keeps it from being one photograph or one pair."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    problem: str = ""

    @property
    def images(self) -> dict[str, Member]:
        """Its pictures."""
        return {ext: member for ext, member in self.members.items() if is_image(ext)}


@dataclass(frozen=True)
class Naming:
    """How names are read. roles: what a name means beside, or against, `ROLES` (a plain picture's name is its
    extension); dotted: `x.one.png` and `x.two.png` are two photographs."""

    roles: Mapping[str, str] = field(default_factory=dict)
    dotted: bool = False

    def role(self, name: str) -> str | None:
        """sharp, blurry or skip, None where the name says nothing."""
        return self.roles.get(name.lower(), ROLES.get(name.lower()))


def given_roles(text: str | None) -> dict[str, str]:
    """Roles from a command line's `input=blurry,target=sharp,mask=skip`; DataError for anything else."""
    roles = {}
    for part in text.split(",") if text else ():
        name, _, role = (each.strip().lower() for each in part.partition("="))
        if not name or role not in (SHARP, BLURRY, SKIP):
            raise DataError(f"roles {text!r}: give NAME=ROLE with commas, ROLE one of {SHARP}, {BLURRY}, {SKIP}")
        roles[name] = role
    return roles


@dataclass(frozen=True)
class _Read:
    """A picture as its name reads: the sample's key and its role, and what says so (ext, folder, stem or nothing)."""

    key: str
    role: str | None
    by: str


def samples_of(members: Iterable[Member], naming: Naming) -> tuple[list[Sample], int]:
    """(samples with a picture, by their first members; how many other members belong to none of them).

    A name that comes twice makes a second sample, `key~2`.
    """
    named = [member for member in members if not is_junk(member.name)]
    reads = _agreed({m.name: _read(m.name, naming) for m in named if is_image(m.name)}, naming)
    keys = {read.key for read in reads.values()}
    alone = Counter(_first(key) for key in keys)
    by_first = {_first(key): key for key in keys if alone[_first(key)] == 1}
    samples: dict[str, list[Sample]] = {}
    left = 0
    for member in named:
        path, _, ext = _path(member.name).rpartition(".")
        if is_image(member.name):
            read = reads[member.name]
            key, ext = read.key, f"{read.role}.{ext}" if read.role in (SHARP, BLURRY) else ext
            skipped = read.role == SKIP
        else:
            stem = _read(member.name, naming).key
            key = stem if stem in keys else by_first.get(_first(path), "")
            ext = _path(member.name)[len(_first(path)) + 1 :] if key not in (path, stem) else ext
            skipped = not key
        if skipped:
            left += 1
            continue
        own = samples.setdefault(key, [Sample(key)])
        if ext in own[-1].members:
            own.append(Sample(f"{key}~{len(own) + 1}"))
        own[-1].members[ext] = member
    found = [sample for own in samples.values() for sample in own if sample.images]
    left += sum(len(sample.members) for own in samples.values() for sample in own if not sample.images)
    _find_problems(found, naming)
    return found, left


def _path(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _first(path: str) -> str:
    """The path up to the first dot of its last part, which is WebDataset's key."""
    folder, slash, base = path.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _read(name: str, naming: Naming) -> _Read:
    """What one name says by itself."""
    path, _, ext = _path(name).rpartition(".")
    folder, _, stem = path.rpartition("/")
    before, dot, last = stem.rpartition(".")
    role = naming.role(last) if dot else naming.roles.get(ext.lower())
    if role is not None:
        return _Read(posixpath.join(folder, before if dot else stem), role, "ext")
    parts = folder.split("/")
    for number in reversed(range(len(parts))):
        if role := naming.role(parts[number]):
            return _Read("/".join([*parts[:number], *parts[number + 1 :], stem]), role, "folder")
    for pattern in (r"(?P<key>.+)[_-](?P<role>[^_-]+|blur_gamma|ground_truth)", r"(?P<role>[^_-]+)[_-](?P<key>.+)"):
        match = re.fullmatch(pattern, stem)
        if match and (role := naming.role(match["role"])):
            return _Read(posixpath.join(folder, match["key"]), role, "stem")
    return _Read(path, None, "")


def _agreed(reads: dict[str, _Read], naming: Naming) -> dict[str, _Read]:
    """Roles by folder or name hold where a picture has its partner, or where all pictures are said to be blurry."""
    partners: dict[tuple[str, str], set[str]] = defaultdict(set)
    for read in reads.values():
        if read.role in (SHARP, BLURRY):
            partners[read.by, read.key].add(read.role)
    blurry_alone = all(read.role == BLURRY for read in reads.values())
    agreed = {}
    for name, read in reads.items():
        paired = len(partners[read.by, read.key]) == 2
        said = read.by == "folder" and read.role == BLURRY
        if read.by in ("", "ext") or read.role == SKIP or paired or said or blurry_alone:
            agreed[name] = read
        else:
            agreed[name] = _Read(_path(name).rpartition(".")[0], None, "")
    return agreed


def _find_problems(samples: list[Sample], naming: Naming) -> None:
    """Say in each sample what keeps it from being one photograph or one pair."""
    together: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        roles = Counter(ext.partition(".")[0] if "." in ext else "" for ext in sample.images)
        names = ", ".join(member.name for member in sample.images.values())
        if roles[BLURRY] and not roles[SHARP] and not roles[""]:
            sample.problem = f"{names}: a blurry picture without its sharp one; {_WAY_OUT}"
        elif len(sample.images) > 1 and (roles[""] or max(roles.values()) > 1):
            sample.problem = f"{names}: which is the photograph, or which are the pair? {_WAY_OUT}"
        elif roles[""]:
            together[_first(sample.key)].append(sample)
    for first, group in together.items():
        rest = [sample.key[len(first) :] for sample in group]
        if len(group) > 1 and not naming.dotted and not all(re.search(r"\d", text) for text in rest):
            names = ", ".join(member.name for sample in group for member in sample.images.values())
            for sample in group:
                sample.problem = f"{names}: one sample, or photographs each (--dotted)? {_WAY_OUT}"


_WAY_OUT = "say what the names mean (--roles blur=blurry,gt=sharp,mask=skip; a plain picture's name is its extension)"
