"""The floors of the house: who may import whom, checked against every import of the product code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"train": ("data", "model", "kernels"), "data": (), "model": ("kernels",), "kernels": ()}

# A wing (or loose file) imports from floors below its own, never from its own floor or above.
FLOORS = {
    "data": (
        ("errors", "files", "formats", "workers"),
        ("picture",),
        ("image",),
        ("blur", "feature_cache", "shards"),
        ("stream", "prepare"),
        ("look",),
    ),
    "train": (
        ("log",),
        ("page", "config"),
        ("engine", "objective"),
        ("checkpoint", "plan", "watch"),
        ("restore",),
        ("evaluate",),
        ("run",),
        ("experiments", "demo"),
        ("cli", "main", "ablation"),
    ),
}


class Import(NamedTuple):
    """One name that a file takes from a module of ours: `from target import name`, `import target` (no name)."""

    file: Path
    line: int
    target: str
    name: str | None

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


def imports_of(path: Path, root: Path) -> Iterator[Import]:
    """Every import of ours in a file, inside functions too."""
    file = path.relative_to(root)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import: say the whole name"
            found = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for target, name in found:
            if target.partition(".")[0] not in PACKAGES:
                continue
            if name is not None and is_module(f"{target}.{name}", root):
                target, name = f"{target}.{name}", None
            yield Import(file, node.lineno, target, name)


def is_module(name: str, root: Path) -> bool:
    path = root.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def wing(module: str) -> str:
    """`train.engine.zero` → engine; the package itself → ''."""
    return [*module.split("."), ""][1]


def module_of(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def all_imports(root: Path = ROOT) -> list[Import]:
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return [each for path in paths for each in imports_of(path, root)]


def wrong_arrows(imports: list[Import]) -> list[str]:
    """A line for every import that the tables do not allow."""
    heights = {name: {w: n for n, floor in enumerate(floors) for w in floor} for name, floors in FLOORS.items()}
    lines = []
    for each in imports:
        here, there = module_of(each.file), each.target
        package, other = here.partition(".")[0], there.partition(".")[0]
        if package != other:
            if other not in PACKAGES[package]:
                lines.append(f"{each.place}: {package} must not import {there}")
        elif package in FLOORS and wing(here) != wing(there) and wing(there):
            above, below = (heights[package].get(wing(name)) for name in (here, there))
            if above is None or below is None:
                lines.append(f"{each.place}: {here} → {there}: no floor is given for one of them")
            elif below >= above:
                way = "upward" if below > above else "sideways"
                lines.append(f"{each.place}: {here} → {there} points {way}: floor {above} → {below}")
    return lines


def circles(imports: list[Import]) -> list[list[str]]:
    """Files that import each other in a ring, through imports of any depth."""
    arrows: dict[str, set[str]] = {}
    for each in imports:
        arrows.setdefault(module_of(each.file), set()).add(each.target)
    found, done = [], set()

    def follow(module: str, way: list[str]) -> None:
        if module in way:
            found.append([*way[way.index(module) :], module])
        elif module not in done:
            for target in sorted(arrows.get(module, ())):
                follow(target, [*way, module])
            done.add(module)

    for module in sorted(arrows):
        follow(module, [])
    return found


def test_the_floors_are_those_of_the_house():
    for package, floors in FLOORS.items():
        found = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
        found |= {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        assert found == {name for floor in floors for name in floor}, package
    assert len(list(all_imports())) > 300


def test_arrows_between_packages_and_wings_point_down():
    assert wrong_arrows(all_imports()) == []


def test_no_file_imports_itself_through_others():
    assert circles(all_imports()) == []


def test_private_names_stay_in_their_wing():
    def crossing(each: Import) -> bool:
        here, there = module_of(each.file), each.target
        private = any(part.startswith("_") for part in (*there.split("."), each.name or ""))
        return private and here.split(".")[:2] != there.split(".")[:2]

    assert [f"{each.place}: {each.target}.{each.name}" for each in all_imports() if crossing(each)] == []


def test_every_wing_says_its_sentence_and_names_its_face():
    for package, floors in FLOORS.items():
        for name in (name for floor in floors for name in floor):
            init = ROOT / package / name / "__init__.py"
            if init.is_file():
                assert ast.get_docstring(ast.parse(init.read_text())), f"{init.relative_to(ROOT)}: say what is in it"


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("train/config/bad.py", "from train.run.session import Session\n", "points upward: floor 1 → 6"),
        ("train/engine/bad.py", "def f():\n    import train.objective.task\n", "points sideways: floor 2 → 2"),
        ("model/bad.py", "\nfrom data.errors import DataError\n", "model must not import data.errors"),
        ("data/blur/bad.py", "from data import stream\n", "points upward: floor 3 → 4"),
    ],
)
def test_a_wrong_arrow_is_told_with_file_and_line(tmp_path, file, text, told):
    for folder in ("train/run", "train/objective", "train/config", "train/engine", "model", "data/blur", "data/stream"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / file).write_text(text)
    (line,) = wrong_arrows(list(imports_of(tmp_path / file, tmp_path)))
    number = next(n for n, each in enumerate(text.splitlines(), 1) if "import" in each)
    assert line.startswith(f"{file}:{number}: ")
    assert line.endswith(told)
