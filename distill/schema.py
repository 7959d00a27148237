"""Strict reading: a YAML mapping in, a tree of frozen dataclasses out, every problem reported at once.

`read_yaml` keeps the line of every key, `merge` lays one source over another, `build` walks a dataclass and
its mapping together. Leaves are converted by OmegaConf in structured mode, so `lr: abc` is an error and
`lr: 1e-4` a float. Nothing is guessed: an unknown key is a problem that names the nearest valid one.
"""

import difflib
import re
import shlex
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.errors import UserError

KeyPath = tuple[str, ...]
COMMAND_LINE = "SET"  # where an override comes from, in place of file:line


def bounded(default: Any = MISSING, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field whose number must lie in [low, high]; without a default the key is required."""
    metadata = {"low": low, "high": high}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def choice(*names: str, default: Any = MISSING) -> Any:
    """A dataclass field that takes one of `names`; without a default the key is required."""
    metadata = {"choices": names}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass
class Source:
    """A mapping read from files, with the place every key path was written."""

    data: dict[str, Any]
    where: dict[KeyPath, str] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)  # of the files, the last one laid on top first


class Report:
    """Collects problems, each with its place, so that a user mends a recipe in one round."""

    def __init__(self, source: Source, title: str) -> None:
        self.where, self.folders, self.title = source.where, source.folders, title
        self.problems: list[str] = []

    def place(self, path: KeyPath) -> str:
        """file:line of the key, or of the nearest enclosing key that has one."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.where:
                return self.where[path[:end]]
        return self.title

    def add(self, path: KeyPath, text: str) -> None:
        problem = f"{self.place(path)}: {'.'.join(path) + ': ' if path else ''}{text}"
        if problem not in self.problems:
            self.problems.append(problem)

    def unknown(self, path: KeyPath, valid: Iterable[str], what: str = "unknown key") -> None:
        self.add(path, f"{what}{nearest(path[-1], valid)}")

    def stop_if_any(self) -> None:
        if len(self.problems) == 1:
            raise UserError(self.problems[0])
        if self.problems:
            raise UserError(f"{self.title} has {len(self.problems)} problems:\n  " + "\n  ".join(self.problems))


def nearest(word: str, valid: Iterable[str]) -> str:
    """The hint that ends an unknown-key message."""
    names = sorted(valid)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f", did you mean '{close[0]}'?"
    return f", valid are: {', '.join(names)}" if names else ", nothing is valid here"


# ---- reading ----------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: plain SafeLoader reads `1e-4` as a string."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")
for _first in "-+0123456789.":
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).insert(0, ("tag:yaml.org,2002:float", _FLOAT))


def parse_value(text: str) -> Any:
    """The value of an override, read as YAML would read it."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> Source:
    """One YAML mapping with the line of each key; UserError when it cannot be read or repeats a key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        others = [str(p) for p in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        close = difflib.get_close_matches(str(path), others, n=1)
        hint = f"did you mean {close[0]}?" if close else "`make recipes` lists them."
        raise UserError(f"There is no recipe {path}: {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The recipe {path} cannot be read: {error}.") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML ({error.problem}).") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({error}).") from None
    if data is None:
        return Source({}, folders=[path.parent])
    if not isinstance(data, dict):
        raise UserError(f"{path}:1: a recipe is a mapping of keys to values, this is a {type(data).__name__}.")
    source = Source(data, folders=[path.parent])
    _mark(node, (), path, source.where)
    return source


def _mark(node: Any, prefix: KeyPath, path: Path, where: dict[KeyPath, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            at = (*prefix, str(key.value))
            place = f"{path}:{key.start_mark.line + 1}"
            if at in where:
                raise UserError(f"{place}: {'.'.join(at)} is written twice, first at {where[at]}; keep one.")
            where[at] = place
            _mark(value, at, path, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            at = (*prefix, str(index))
            where[at] = f"{path}:{value.start_mark.line + 1}"
            _mark(value, at, path, where)


def merge(base: Source, over: Source) -> Source:
    """`over` laid on `base`: mappings merge, lists and leaves replace, a mapping whose `kind` changes replaces."""
    where = dict(base.where)
    data = _merge(base.data, over.data, (), where)
    where.update(over.where)
    return Source(data, where, [*over.folders, *base.folders])


def _merge(base: Any, over: Any, path: KeyPath, where: dict[KeyPath, str]) -> Any:
    both = isinstance(base, dict) and isinstance(over, dict)
    if not both or ("kind" in over and over["kind"] != base.get("kind")):
        for key in [key for key in where if key[: len(path)] == path]:
            del where[key]  # what is replaced has no line any more
        return over
    merged = dict(base)
    for key, value in over.items():
        merged[key] = _merge(base[key], value, (*path, str(key)), where) if key in base else value
    return merged


def split_overrides(text: str) -> tuple[str, ...]:
    """`a.b=1 c="x y" d={e: 1, f: [2, 3]}` -> its three overrides: they part at spaces outside quotes and brackets."""
    try:
        words = shlex.split(text)
    except ValueError:
        raise UserError(f"A quotation in the overrides {text} does not end.") from None
    overrides: list[str] = []
    for word in words:
        if overrides and _is_open(overrides[-1].partition("=")[2]):
            overrides[-1] += f" {word}"
        else:
            overrides.append(word)
    return tuple(overrides)


def _is_open(value: str) -> bool:
    """A mapping or list that lacks its end."""
    return value.startswith(("[", "{")) and sum(map(value.count, "[{")) > sum(map(value.count, "]}"))


def override(source: Source, text: str) -> None:
    """Apply one `a.b=value`; a number in the path indexes a list (`phases.0.every=2`). As in `merge`, another `kind`
    replaces what the files say beside it."""
    name, equals, value = text.partition("=")
    path = tuple(part.strip() for part in name.split("."))
    if not equals or not all(path):
        raise UserError(f"The override '{text}' is not of the form key.key=value.")
    try:
        parsed = parse_value(value)
    except yaml.YAMLError:
        raise UserError(f"The value of the override '{text}' is not valid YAML.") from None
    target: Any = source.data
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(target, list):
            if not part.isdigit() or int(part) >= len(target):
                at = ".".join(path[:depth])
                raise UserError(f"The override '{text}' needs an index from 0 to {len(target) - 1} after {at}.")
            key: Any = int(part)
        elif isinstance(target, dict):
            key = part
        else:
            raise UserError(f"The override '{text}' goes inside {'.'.join(path[:depth])}, which is not a mapping.")
        if last:
            if key == "kind" and isinstance(target, dict) and target.get("kind") != parsed:
                _drop_settings_of_files(source, target, path[:-1])
            target[key] = parsed
        elif isinstance(target, dict) and target.get(key) is None:
            target[key] = {}
        target = target[key]
    source.where[path] = COMMAND_LINE


def _drop_settings_of_files(source: Source, block: dict[str, Any], path: KeyPath) -> None:
    """Leave in `block` at `path` only what the command line says."""
    for name in [name for name in block if source.where.get((*path, name)) != COMMAND_LINE]:
        del block[name]
        for key in [key for key in source.where if key[: len(path) + 1] == (*path, name)]:
            del source.where[key]


# ---- building ---------------------------------------------------------------------------------------------


def build(cls: type, data: Any, path: KeyPath, report: Report) -> Any:
    """An instance of the dataclass `cls` from the mapping `data`, or None with the reasons in `report`."""
    if not isinstance(data, dict):
        report.add(path, f"a mapping is needed here, this is {data!r}")
        return None
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls) if f.init}
    before = len(report.problems)
    values: dict[str, Any] = {}
    for key in data:
        if str(key) not in known:
            report.unknown((*path, str(key)), known)
    for name, spec in known.items():
        at = (*path, name)
        if name in data:
            values[name] = _value(hints[name], data[name], at, report)
            _check_bounds(spec.metadata, values[name], at, report)
        elif spec.default is MISSING and spec.default_factory is MISSING:
            report.add(at, f"this key is required{f' in {chr(46).join(path)}' if path else ''}")
    if len(report.problems) > before:
        return None
    try:
        return cls(**values)
    except (ValueError, UserError) as error:  # the class's own cross-field rules
        report.add(path, str(error))
        return None


def _value(hint: Any, data: Any, path: KeyPath, report: Report) -> Any:
    options = [a for a in typing.get_args(hint) if a is not type(None)]
    origin = typing.get_origin(hint)
    if hint is Any or is_dataclass(data):  # built already, by the one who knows its class
        return data
    if origin in (typing.Union, types.UnionType):
        if data is None and len(options) < len(typing.get_args(hint)):
            return None
        if len(options) == 1:
            hint, origin, options = options[0], typing.get_origin(options[0]), list(typing.get_args(options[0]))
    if isinstance(hint, type) and is_dataclass(hint):
        return build(hint, data, path, report)
    if origin in (list, tuple) and options and is_dataclass(options[0]):
        if not isinstance(data, list):
            report.add(path, f"a list is needed here, this is {data!r}")
            return None
        cls = typing.cast(type, options[0])
        return origin(build(cls, item, (*path, str(index)), report) for index, item in enumerate(data))
    if origin is dict and len(options) == 2 and is_dataclass(options[1]) and isinstance(data, dict):
        return {str(key): _value(options[1], item, (*path, str(key)), report) for key, item in data.items()}
    return _leaf(hint, data, path, report)


def _leaf(hint: Any, data: Any, path: KeyPath, report: Report) -> Any:
    """One value through OmegaConf's structured mode; containers come back as plain lists, tuples, dicts."""
    if hint is str and isinstance(data, bool):
        report.add(path, f"text is needed here, this is {data!r}; put it in quotes")
        return None
    if hint is str and isinstance(data, int | float):
        data = str(data)
    if hint in (bool, int, float) and type(data) is hint:
        return data  # most leaves: nothing to convert
    holder = OmegaConf.structured(_leaf_class(hint))
    try:
        OmegaConf.update(holder, "value", data)
        value = holder.value
    except OmegaConfBaseException as error:
        report.add(path, str(error).splitlines()[0].replace("field 'value' is not Optional", "a value is needed here"))
        return None
    return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


@cache
def _leaf_class(hint: Any) -> type:
    return make_dataclass("Leaf", [("value", hint)])


def _check_bounds(metadata: Any, value: Any, path: KeyPath, report: Report) -> None:
    if value is None:
        return
    low, high = metadata.get("low"), metadata.get("high")
    if isinstance(value, int | float) and not ((low is None or value >= low) and (high is None or value <= high)):
        span = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
        report.add(path, f"{value!r} is out of range, it must be {span}")
    if "choices" in metadata and value not in metadata["choices"]:
        report.add(path, f"{value!r} is not one of {', '.join(metadata['choices'])}{nearest_choice(value, metadata)}")


def nearest_choice(value: Any, metadata: Any) -> str:
    """A hint only when one choice is close; the list of choices stands in the message already."""
    close = difflib.get_close_matches(str(value), metadata["choices"], n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def differing_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two resolved recipes."""
    left, right = _flat(old), _flat(new)
    return sorted(".".join(key) for key in left.keys() | right.keys() if left.get(key) != right.get(key))


def _flat(data: Any, path: KeyPath = ()) -> dict[KeyPath, Any]:
    if isinstance(data, dict):
        items = data.items()
    elif isinstance(data, list):
        items = {str(index): item for index, item in enumerate(data)}.items()
    else:
        return {path: data}
    return {key: leaf for name, item in items for key, leaf in _flat(item, (*path, str(name))).items()}
