"""Strict YAML: a mapping becomes a frozen object, or one message names every problem, its place and the fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from msn_dist.errors import InputError

_SHORT = 12  # a list of keys that is told whole


class Part(BaseModel):
    """Base of every configuration object: unknown keys and loose types are errors.

    `union_tags` are the names by which the parts of a whole choose one of several classes.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    union_tags: ClassVar[Mapping[str, type[Part]]] = {}


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; InputError if there is no such file or no mapping in it."""
    try:
        text = path.read_text()
    except OSError as error:
        raise InputError(f"{path}: cannot read this file ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is no text in UTF-8") from None
    tree = parse_text(text, str(path))
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise InputError(f"{path}: expected a mapping of keys to values, found {found}")
    return tree


def parse(kind: type[Part], tree: dict[str, Any], place: str) -> Any:
    """Validate `tree` as `kind`; InputError lists every problem with its key path."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise InputError(_explain(kind, error, place)) from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-3 is a number, as every reader expects, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is no plain value", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_text(text: str, place: str) -> Any:
    """What YAML says; InputError names the place in it."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{place}:{where} is not valid YAML ({getattr(error, 'problem', error)})") from None
    except (ValueError, OverflowError) as error:  # a date or a number as YAML writes it, of a day that is none
        raise InputError(f"{place}: holds a value that cannot be ({str(error).splitlines()[0]})") from None
    except RecursionError:
        raise InputError(f"{place}: is nested too deep") from None


def _explain(kind: type[Part], error: ValidationError, place: str) -> str:
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"] if part not in kind.union_tags)
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            known = _siblings(kind, problem["loc"])
            close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
            others = f"; here may be {', '.join(known)}" if 0 < len(known) <= _SHORT else ""
            message = "unknown key" + (f"; did you mean {close[0]!r}?" if close else others)
        elif problem["type"] == "missing":
            message = "is required"
        elif problem["type"].startswith("union_tag"):
            key = problem["ctx"]["discriminator"].strip("'")
            path, message = f"{path}.{key}", "must be one of " + ", ".join(sorted(kind.union_tags))
        elif problem["type"] == "model_type":
            message = f"must have keys of its own, found {problem['input']!r}"
        elif problem["type"] != "value_error":
            message = f"{message[0].lower()}{message[1:]}, found {problem['input']!r}"
        lines.append(f"{place}: {path}: {message}" if path else f"{place}: {message}")
    return "\n".join(lines)


def _siblings(kind: Any, loc: tuple) -> list[str]:
    """Valid names beside the last part of `loc`, walking the model classes down from `kind`."""
    tags = kind.union_tags
    for part in loc[:-1]:
        if part in tags:
            kind = tags[part]
            continue
        field = getattr(kind, "model_fields", {}).get(part)
        if field is None:
            return []
        options = [k for k in (field.annotation, *get_args(field.annotation)) if hasattr(k, "model_fields")]
        kind = options[0] if options else None
    return list(getattr(kind, "model_fields", {}))
