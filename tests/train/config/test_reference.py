"""docs/CONFIG.md says what the code takes: all of it, with the values that hold where a file says nothing."""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, Field

from train.config.reference import reference
from train.config.schema import Config

PAGE = Path(__file__).parents[3] / "docs" / "CONFIG.md"


def rows(page: str) -> dict[str, list[str]]:
    """Cells of every key, by its whole path."""
    found, section = {}, ""
    for line in page.splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")]
            found[f"{section}.{cells[0].strip('`')}"] = cells[1:]
    return found


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python -m train.config.reference > docs/CONFIG.md"


def test_every_key_has_its_default_and_a_meaning():
    page, seen = rows(reference()), 0

    def walk(section: BaseModel, path: str) -> None:
        nonlocal seen
        for name in type(section).model_fields:
            value, key = getattr(section, name), f"{path}.{name}".lstrip(".")
            if isinstance(value, BaseModel):
                walk(value, key)
                continue
            if key not in page:  # a section that is off by default has its keys alone
                assert value is None
                assert any(each.startswith(f"{key}.") for each in page)
                continue
            default, _, meaning = page[key]
            seen += 1
            assert meaning or path == "model", key
            if isinstance(value, (bool, int, str)):
                shown = yaml.safe_load(default.strip("`"))
                assert {True: "on", False: "off"}.get(shown, shown) == value or shown == value, key

    walk(Config(), "")
    assert seen > 120


def test_bounds_choices_and_lists_are_said():
    class Entry(BaseModel):
        at: int = Field(ge=1, description="From | on.")

    class Part(BaseModel):
        share: Annotated[float, Field(gt=0, le=1)] = 0.5
        kind: Literal["a", "b"] | None = None
        later: list[Entry] = []

    class Whole(BaseModel):
        part: Part = Part()

    page = rows(reference(Whole))
    assert page["part.share"][:2] == ["`0.5`", "a number, > 0, ≤ 1"]
    assert page["part.kind"][:2] == ["none", "`a`, `b` or none"]
    assert page["part.later"][:2] == ["`[]`", "a list of sections"]
    assert page["part.later[…].at"] == ["required", "a whole number, ≥ 1", "From ¦ on."]
