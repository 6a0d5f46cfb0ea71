"""docs/CONFIG.md from the typed configuration: every key with its default, what it may be, and what it means.

python -m train.config.reference > docs/CONFIG.md      # a test holds the page to the code
"""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from train.config.schema import Config

HEAD = """# Configuration

Every key that a YAML file may have, from the types in the code (`python -m train.config.reference`; a test keeps this
page current). A file needs only what differs from the defaults; `extends: other.yaml` takes another one's settings
first, and `--set model.spe.dim=32` changes one key on a command line. A wrong key or value is told with its line
before anything starts.
"""
BOUNDS = {
    Ge: ("≥", "ge"),
    Gt: (">", "gt"),
    Le: ("≤", "le"),
    Lt: ("<", "lt"),
    MultipleOf: ("a multiple of", "multiple_of"),
}
PLAIN = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping"}


def reference(config: type[BaseModel] = Config) -> str:
    """The page: a Markdown table a section, in the order of the code."""
    parts = [HEAD]
    for path, section, given in _sections(config, "", config()):
        rows = [(name, field) for name, field in section.model_fields.items() if _section_of(field) is None]
        if rows:
            parts += [f"## {path}", "", "| key | default | may be | meaning |", "|---|---|---|---|"]
            parts += [
                f"| `{n}` | {_default(n, field, given)} | {_kind(field)} | {_meaning(field)} |" for n, field in rows
            ]
            parts.append("")
    return "\n".join(parts)


def _sections(
    model: type[BaseModel], path: str, given: BaseModel | None
) -> list[tuple[str, type[BaseModel], BaseModel | None]]:
    """(path, section, the section's values in a configuration of defaults; None: it is in none) of all sections."""
    found = [(path, model, given)]
    for name, field in model.model_fields.items():
        own, entry = _section_of(field), _entry_of(field)
        if own is not None:
            found += _sections(own, f"{path}.{name}".lstrip("."), getattr(given, name, None))
        elif entry is not None:
            found += _sections(entry, f"{path}.{name}[…]".lstrip("."), None)
    return found


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field is: itself, or `Section | None`."""
    return next((each for each in _alternatives(field.annotation) if _is_section(each)), None)


def _entry_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that each entry of a list of sections is."""
    for each in _alternatives(field.annotation):
        inner = typing.get_args(each)
        if typing.get_origin(each) is list and _is_section(inner[0]):
            return inner[0]
    return None


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _alternatives(kind: Any) -> tuple:
    if typing.get_origin(kind) is Annotated:
        return _alternatives(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (Union, types.UnionType):
        return tuple(one for each in typing.get_args(kind) for one in _alternatives(each))
    return (kind,)


def _default(name: str, field: FieldInfo, given: BaseModel | None) -> str:
    if given is None and field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True) if given is None else getattr(given, name)
    if value is None:
        return "none"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, BaseModel):
        set_ = {k: v for k, v in value.model_dump().items() if v != type(value).model_fields[k].default}
        return _yaml(set_ or {k: value.model_dump()[k] for k in list(value.model_dump())[:1]})
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _kind(field: FieldInfo) -> str:
    words = []
    for each in _alternatives(field.annotation):
        if each is type(None):
            words.append("none")
        else:
            words.append(_word(each))
    bounds = [
        f"{sign} {getattr(bound, name):g}" for kind, (sign, name) in BOUNDS.items()
        for bound in field.metadata if isinstance(bound, kind)
    ]  # fmt: skip
    said = " or ".join(dict.fromkeys(words))
    return said + (f", {', '.join(bounds)}" if bounds else "")


def _word(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in inner)
    if origin is list:
        what = "sections" if _is_section(inner[0]) else _word(_alternatives(inner[0])[0])
        return f"a list of {what}"
    if origin is tuple:
        return "a list of 2 numbers" if len(inner) == 2 and inner[1] is not ... else "a list"
    if origin is dict:
        return "a mapping"
    return PLAIN.get(kind, getattr(kind, "__name__", str(kind)))


def _meaning(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
