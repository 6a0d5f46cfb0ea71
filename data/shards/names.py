"""Which members of a tar are one sample, and which picture of a pair is the blurry one: read from their names.

Writers of shards agree on little. Pairs tell their pictures apart by what stands before the extension (`x.input.png`,
`x.target.png`), by folder (`blur/x.png`, `sharp/x.png`, `train_blur/…`) or at an end of the name (`x_blur.png`,
`x_sharp.png`); any other picture is a sample of its own, under its path up to the last dot. Where two readings are
possible (`x.jpg` beside `x.mask.png`: a mask is no photograph) nothing is guessed: that is a problem, and its line
names the way out.
"""

import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from data.errors import DataError
from data.formats import is_image, is_junk
from data.shards.tar import Member

SHARP, BLURRY, SKIP, NONE = "sharp", "blurry", "skip", "none"
_SHARP = ("sharp", "target", "gt", "groundtruth", "ground_truth", "clean", "hq", "hr", "sharp_gt", "gt_sharp")
_BLURRY = (
    "blurry",
    "blur",
    "blurred",
    "input",
    "source",
    "lq",
    "lr",
    "degraded",
    "blur_gamma",
    "real_blur",
    "avg_blur",
)
ROLES = dict.fromkeys(_SHARP, SHARP) | dict.fromkeys(_BLURRY, BLURRY)
"""Names that the field's data sets give to the pictures of a pair."""

_WAY_OUT = (
    "say what the names mean (--roles blur=blurry,gt=sharp,mask=skip,word=none; a plain picture's is its extension)"
)


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
        found = self._known.get(name.lower())
        return None if found == NONE else found

    def at_an_end(self, name: str) -> tuple[str | None, str]:
        """(role, rest of the name) where the name is a role, or ends or begins with one; (None, name) otherwise."""
        match = self._ends.fullmatch(name)
        if match is None:
            return None, name
        found = next(word for word in match.group("whole", "last", "first") if word)
        return self.role(found), match["before"] or match["after"] or ""

    @cached_property
    def _known(self) -> dict[str, str]:
        return {**ROLES, **self.roles}

    @cached_property
    def _ends(self) -> re.Pattern:
        words = sorted((word for word, role in self._known.items() if role != NONE), key=len, reverse=True)
        any_of = "|".join(map(re.escape, words))
        return re.compile(
            rf"(?P<whole>{any_of})|(?P<before>.+)[_\- ](?P<last>{any_of})|(?P<first>{any_of})[_\- ](?P<after>.+)", re.I
        )


def given_roles(text: str | None) -> dict[str, str]:
    """Roles from a command line's `input=blurry,target=sharp,mask=skip`; DataError for anything else."""
    roles = {}
    for part in text.split(",") if text else ():
        name, _, role = (each.strip().lower() for each in part.partition("="))
        if not name or role not in (SHARP, BLURRY, SKIP, NONE):
            raise DataError(
                f"roles {text!r}: give NAME=ROLE with commas, ROLE one of {SHARP}, {BLURRY}, {SKIP}, {NONE}"
            )
        roles[name] = role
    return roles


@dataclass(frozen=True)
class _Read:
    """A picture as its name reads: the sample's key; its role, and what says so (ext, folder, stem, or nothing); the
    name with a star in the role's place, which its partner shares."""

    key: str
    role: str | None = None
    by: str = ""
    starred: str = ""


def samples_of(members: Iterable[Member], naming: Naming, shard: str = "") -> tuple[list[Sample], int]:
    """(samples with a picture, by their first members; how many other members belong to none of them).

    A name that comes twice makes a second sample, `key~2`. shard: the tar's name, which may say blurry too.
    """
    members = list(members)
    named = [member for member in members if not is_junk(member.name)]
    reads = {m.name: _read(m.name, naming) for m in named if is_image(m.name)}
    partners: dict[str, set[str]] = defaultdict(set)
    for read in reads.values():
        partners[read.starred].add(read.role or "")
    for name, read in reads.items():
        if read.by == "stem" and read.role == SHARP and len(partners[read.starred]) < 2:
            reads[name] = _Read(_path(name).rpartition(".")[0], starred=name)  # a photograph of that name
        elif read.by == "folder" and read.role == SHARP and len(partners[read.starred]) < 2:
            reads[name] = _Read(_path(name).rpartition(".")[0], SHARP, "alone", name)
    found = _assembled(named, reads)
    _attach_others(named, found, naming)
    _find_problems(found, reads, naming, shard)
    return found, len(members) - sum(len(sample.members) for sample in found)


def _assembled(named: list[Member], reads: dict[str, _Read]) -> list[Sample]:
    """Samples of the pictures, but for those whose role is skip."""
    samples: dict[tuple[str, int], Sample] = {}
    seen: Counter[str] = Counter()
    keys: Counter[str] = Counter()
    for member in named:
        if not is_image(member.name):
            continue
        read = reads[member.name]
        if read.role == SKIP:
            continue
        ext = _path(member.name).rpartition(".")[2]
        ext = f"{read.role}.{ext}" if read.role in (SHARP, BLURRY) and read.by != "alone" else ext
        place = (read.starred if read.role else read.key, seen[member.name])
        seen[member.name] += 1
        if place not in samples:
            keys[read.key] += 1
            number = keys[read.key]
            samples[place] = Sample(read.key if number == 1 else f"{read.key}~{number}")
        sample = samples[place]
        if read.role in (SHARP, BLURRY) and any(each.startswith(f"{read.role}.") for each in sample.members):
            names = ", ".join(each.name for each in [*sample.members.values(), member])
            sample.problem = f"{names}: two {read.role} pictures of one pair; {_WAY_OUT}"
            ext = f"{ext}~{len(sample.members)}"
        sample.members[ext] = member
    return list(samples.values())


def _attach_others(named: list[Member], samples: list[Sample], naming: Naming) -> None:
    """Give json, txt and such to the sample of their name, the second of a name to the second of a key."""
    by_key: dict[str, list[Sample]] = defaultdict(list)
    by_first: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        key = re.sub(r"~\d+$", "", sample.key)
        by_key[key].append(sample)
        by_first[_first(key)].append(sample)
    seen: Counter[str] = Counter()
    for member in named:
        if is_image(member.name):
            continue
        path, _, ext = _path(member.name).rpartition(".")
        turn = seen[member.name]
        seen[member.name] += 1
        own = by_key.get(_read(member.name, naming).key) or by_key.get(path)
        if own is None and len(by_first[_first(path)]) == 1:
            own, ext = by_first[_first(path)], _path(member.name)[len(_first(path)) + 1 :]
        if own is not None and turn < len(own) and ext not in own[turn].members:
            own[turn].members[ext] = member


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
    if dot and (role := naming.role(last)):
        return _Read(posixpath.join(folder, before), role, "ext", posixpath.join(folder, f"{before}.*"))
    if role := naming.roles.get(ext.lower()):
        return _Read(path, None if role == NONE else role, "ext", f"{path}.*")
    parts = folder.split("/") if folder else []
    for number in reversed(range(len(parts))):
        role, rest = naming.at_an_end(parts[number])
        if role is not None:
            while (again := naming.at_an_end(stem)) and again[0] == role:  # blur/blur_1.png beside gt/gt_1.png
                stem = again[1]
            around = [*parts[:number], rest, *parts[number + 1 :]]
            starred = "/".join([*parts[:number], f"*{rest}", *parts[number + 1 :], stem])
            return _Read("/".join(part for part in [*around, stem] if part) or "pair", role, "folder", starred)
    role, rest = naming.at_an_end(stem)
    if role is not None:
        key = posixpath.join(folder, rest).rstrip("/") or "pair"
        return _Read(key, role, "stem", posixpath.join(folder, f"*{rest}"))
    return _Read(path, starred=path)


def _find_problems(samples: list[Sample], reads: dict[str, _Read], naming: Naming, shard: str) -> None:
    """Say in each sample what keeps it from being one photograph or one pair."""
    together: dict[str, list[Sample]] = defaultdict(list)
    of_shard, _ = naming.at_an_end(shard.partition(".")[0])
    stems: dict[str, list[str]] = defaultdict(list)
    for name, read in reads.items():
        stems[posixpath.basename(_path(name)).rpartition(".")[0]].append(read.by)
    for sample in samples:
        if sample.problem:
            continue
        roles = Counter(ext.partition(".")[0] if "." in ext else "" for ext in sample.images)
        names = ", ".join(member.name for member in sample.images.values())
        first = next(iter(sample.images.values())).name
        if roles[BLURRY] and not roles[SHARP] and not roles[""]:
            sample.problem = f"{names}: a blurry picture without its sharp one; {_WAY_OUT}"
        elif len(sample.images) > 1 and (roles[""] or max(roles.values()) > 1):
            sample.problem = f"{names}: which is the photograph, or which are the pair? {_WAY_OUT}"
        elif roles[""] and of_shard == BLURRY:
            sample.problem = f"{names}: the shard's name says blurry; pack pairs into one shard, or {_WAY_OUT}"
        elif reads[first].by == "alone" and "" in stems[posixpath.basename(_path(first)).rpartition(".")[0]]:
            sample.problem = f"{names}: another folder has a picture of this name: a pair? {_WAY_OUT}"
        elif roles[""]:
            together[_first(sample.key)].append(sample)
    for first, group in together.items():
        rest = [re.sub(r"~\d+$", "", sample.key)[len(first) :] for sample in group]
        if len(group) > 1 and not naming.dotted and not all(re.fullmatch(r"(\.[\d_-]+)*", text) for text in rest):
            names = ", ".join(member.name for sample in group for member in sample.images.values())
            for sample in group:
                sample.problem = f"{names}: one sample, or photographs each (--dotted)? {_WAY_OUT}"
