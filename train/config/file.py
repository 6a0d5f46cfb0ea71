"""YAML files → `Config`: `extends`, `--set`, and errors that name file, line, key and the nearest known key."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from train.config.schema import Config

Place = str  # "file:line", or "--set key=value": where a value was written
Keys = tuple[str, ...]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line for the user."""


class _Loader(yaml.SafeLoader):
    """YAML with floats as in YAML 1.2 (`1e-4` is a number; PyYAML's 1.1 rule reads it as text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)

# The integer rule has to stay first: the float rule above also matches whole numbers.
for _initial, _rules in _Loader.yaml_implicit_resolvers.items():
    _Loader.yaml_implicit_resolvers[_initial] = sorted(_rules, key=lambda rule: rule[0] != "tag:yaml.org,2002:int")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The `Config` of a YAML file with `key.sub=value` overrides applied. ConfigError names file and line."""
    values, places = _read(Path(path), ())
    for override in overrides:
        _override(values, places, override)
    return build_config(values, places)


def configure(overrides: Sequence[str]) -> Config:
    """The `Config` of `key.sub=value` overrides alone, without a file. ConfigError names the override."""
    values: dict[str, Any] = {}
    places: dict[Keys, Place] = {}
    for text in overrides:
        _override(values, places, text)
    return build_config(values, places)


def build_config(values: dict[str, Any], places: Mapping[Keys, Place] | None = None) -> Config:
    """The `Config` of nested dictionaries; `places` says where each key was written. ConfigError otherwise."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, places or {})) from None


def dump_config(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(path: Path, parents: tuple[Path, ...]) -> tuple[dict[str, Any], dict[Keys, Place]]:
    if path.resolve() in parents:
        raise ConfigError(f"{path}: `extends` goes round in a circle")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot read the configuration: {reason}") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not YAML: {getattr(error, 'problem', error)}") from None
    places: dict[Keys, Place] = {}
    values = {} if node is None else _construct(node, path, (), places)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: expected `section: …` lines")
    if "extends" not in values:
        return values, places
    base = values.pop("extends")
    if not isinstance(base, str):
        raise ConfigError(f"{places[('extends',)]}: extends takes the path of one file")
    below, base_places = _read(path.parent / base, (*parents, path.resolve()))
    _merge(below, values)
    return below, {**base_places, **places}


def _construct(node: yaml.Node, path: Path, keys: Keys, places: dict[Keys, Place]) -> Any:
    """Plain values of a YAML node, noting where each key stands; a key given twice is an error."""
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = f"{path}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{place}: a key must be a word")
            key = key_node.value
            if key in mapping:
                raise ConfigError(f"{place}: {'.'.join((*keys, key))} is given twice")
            places[(*keys, key)] = place
            mapping[key] = _construct(value_node, path, (*keys, key), places)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, path, (*keys, str(i)), places) for i, item in enumerate(node.value)]
    try:
        return _Loader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: {error}") from None


def _merge(below: dict[str, Any], above: dict[str, Any], name: str = "") -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), list):
            _merge_into_list(below[key], value, f"{name}{key}")
            continue
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            # Another backbone takes other arguments: its settings replace the base's as a whole.
            if key == "backbone" and value.get("name", below[key].get("name")) != below[key].get("name"):
                below[key] = value
            else:
                _merge(below[key], value, f"{name}{key}.")
        else:
            below[key] = value


def _merge_into_list(below: list[Any], above: dict[str, Any], name: str) -> None:
    """Settings for one element of a list: `teacher.0.weights`, or without a number where there is but one."""
    if not all(key.isdigit() for key in above):
        if len(below) != 1:
            raise ConfigError(
                f"{name}: there are {len(below)}: say which of them, such as {name}.0.{next(iter(above))}"
            )
        above = {"0": above}
    for number, value in above.items():
        if int(number) >= len(below):
            raise ConfigError(f"{name}.{number}: there are {len(below)}, counted from 0")
        inner = below[int(number)]
        if isinstance(value, dict) and isinstance(inner, dict):
            _merge(inner, value, f"{name}.{number}.")
        else:
            below[int(number)] = value


def _override(values: dict[str, Any], places: dict[Keys, Place], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: expected key.sub=value, such as optim.lr=1e-4")
    try:
        value = yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value is not YAML") from None
    layer: dict[str, Any] = {keys[-1]: value}
    for key in reversed(keys[:-1]):
        layer = {key: layer}
    _merge(values, layer)
    for depth in range(1, len(keys) + 1):
        places[keys[:depth]] = f"--set {override}"


def _explain(error: ValidationError, places: Mapping[Keys, Place]) -> str:
    """One line for the first problem pydantic found (and how many more there are)."""
    problems = error.errors()
    first = problems[0]
    keys = tuple(str(part) for part in first["loc"])
    # One teacher (or source) may be written without its place in the list.
    written = keys if keys in places else tuple(key for key in keys if not key.isdigit())
    place = next((places[w[:n]] for w in (written, keys) for n in range(len(w), 0, -1) if w[:n] in places), None)
    place = place or "configuration"
    name = ".".join(keys) or "configuration"
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}" if known else ""
        message = f"{place}: unknown key {name}" + (f": {hint}" if hint else "")
    else:
        text = first["msg"].removeprefix("Value error, ")
        if first["type"] == "string_type" and not isinstance(first["input"], (dict, list)):
            text += ": put quotes round it"
        given = "" if isinstance(first["input"], (dict, BaseModel)) else f" (given: {first['input']!r})"
        message = f"{place}: {name}: {text}{given}"
    more = len(problems) - 1
    return message + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else "")


def _known_keys(location: Sequence[Any]) -> list[str]:
    """Field names of the model at a location of the configuration (list indices and dict keys are stepped through)."""
    kind: Any = Config
    for part in location:
        if isinstance(part, int):
            continue
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(part))
            kind = field.annotation if field else None
        kind = _inner_model(kind)
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _inner_model(kind: Any) -> Any:
    """The pydantic model inside `Model | None`, `list[Model]`, `dict[str, Model]`; otherwise `kind` itself."""
    origin = typing.get_origin(kind)
    if origin is None and not isinstance(kind, types.UnionType):
        return kind
    for argument in typing.get_args(kind):
        inner = _inner_model(argument)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            return inner
    return kind
