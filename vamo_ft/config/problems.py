"""Pydantic's findings as short plain sentences, each with the key it is about."""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vamo_ft.config.section import Section
from vamo_ft.config.yaml_text import KeyPath, dotted

__all__ = ["Problem", "find_problems"]


@dataclass(frozen=True, slots=True)
class Problem:
    """`method.probes: must be at least 1, not 0`, in two parts: the key and what is said of it."""

    path: KeyPath
    text: str


def find_problems(error: ValidationError, *, schema: type[Section]) -> list[Problem]:
    """Every finding once: the branches of a union are told in one sentence, and tags are not part of a key.

    Args:
        schema: the whole file's section, which was validated.
    """
    details = error.errors(include_url=False)
    paths = [_follow(item["loc"], schema).path for item in details]
    presets_unknown = any(item["type"] == "union_tag_invalid" and item["loc"][-1] == "method" for item in details)
    problems: list[Problem] = []
    requirements: dict[KeyPath, list[ErrorDetails]] = {}
    for item, path in zip(details, paths, strict=True):
        if item["type"] == "missing" and path[-2:] == ("optimizer", "name") and presets_unknown:
            continue  # most methods bring a rule along
        if item["type"] not in _REQUIREMENTS:
            problems.append(_explain(item, schema))
        elif not any(len(other) > len(path) and other[: len(path)] == path for other in paths):
            requirements.setdefault(path, []).append(item)
    problems.extend(Problem(path, _requirement(items)) for path, items in requirements.items())
    return problems


_OTHER_NAMES = {"max_samples": "limit", "num_samples": "limit", "type": "format"}
"""What other programs call a key."""

# What a value must be, by pydantic's error type; the branches of a union are joined with "or".
_REQUIREMENTS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "literal_error": lambda context: _either(_choices(context["expected"])),
    "int_type": lambda _: "a whole number",
    "float_type": lambda _: "a number",
    "finite_number": lambda _: "a finite number",
    "bool_type": lambda _: "true or false",
    "string_type": lambda _: "text",
    "string_too_short": lambda _: "text that is not empty",
    "list_type": lambda _: "a list",
    "tuple_type": lambda _: "a list",
    "dict_type": lambda _: "a mapping",
    "model_type": lambda _: "a section with keys",
    "model_attributes_type": lambda _: "a section with keys",
    "greater_than": lambda context: f"above {context['gt']:g}",
    "greater_than_equal": lambda context: f"at least {context['ge']:g}",
    "less_than": lambda context: f"below {context['lt']:.19g}",
}


def _requirement(items: Sequence[ErrorDetails]) -> str:
    value = items[0]["input"]
    needs = [_REQUIREMENTS[item["type"]](item.get("ctx", {})) for item in items]
    text = f"must be {' or '.join(dict.fromkeys(needs))}, not {_show(value)}"
    if needs == ["text"] and isinstance(value, int | float):
        text += "; put it in quotes"
    choices = [choice for item in items for choice in _choices(item.get("ctx", {}).get("expected", ""))]
    return text + _did_you_mean(value, choices)


def _explain(item: ErrorDetails, schema: type[Section]) -> Problem:
    place = _follow(item["loc"], schema)
    context = item.get("ctx", {})
    match item["type"]:
        case "missing" if place.section is None:
            return Problem(place.path[:-1], f"must have {int(place.path[-1]) + 1} values, not {len(item['input'])}")
        case "missing":
            return Problem(place.path, _missing(place))
        case "extra_forbidden" | "invalid_key":
            return Problem(place.path, _unknown(place, schema))
        case "union_tag_invalid" | "union_tag_not_found":
            key = _tag(place.members[0]).key
            choices = [value for member in place.members for value in _tag(member).values]
            if item["type"] == "union_tag_not_found":
                return Problem((*place.path, key), f"required: {_either(choices)}")
            value = item["input"][key]
            text = f"must be {_either(choices)}, not {_show(value)}{_did_you_mean(value, choices)}"
            return Problem((*place.path, key), text)
        case "too_short":
            least = context["min_length"]
            entries = "entry" if least == 1 else "entries"
            return Problem(place.path, f"must have at least {least} {entries}, not {context['actual_length']}")
        case "too_long":
            return Problem(place.path, f"must have {context['max_length']} values, not {context['actual_length']}")
        case "value_error":
            return _rule(place, str(context["error"]))
    return Problem(place.path, item["msg"])


def _rule(place: "_Place", text: str) -> Problem:
    """A rule over a section names the key it is about in front: `nesterov: needs momentum above 0`."""
    match = re.match(r"([a-z0-9_.]+): (.+)", text)
    sections = [member for member in place.members if _is_section(member)]
    if match is not None and any(match[1].split(".")[0] in section.model_fields for section in sections):
        return Problem((*place.path, *match[1].split(".")), match[2])
    return Problem(place.path, text)


def _missing(place: "_Place") -> str:
    assert place.section is not None
    field = place.section.model_fields[place.path[-1]]
    sections = [member for member in _members(field.annotation) if _is_section(member)]
    if not sections:
        return f"required ({field.description})"
    keys = [key for key, child in sections[0].model_fields.items() if child.is_required()]
    return f"required section{' with ' + ', '.join(keys) if keys else ''}"


def _unknown(place: "_Place", schema: type[Section]) -> str:
    assert place.section is not None
    key, allowed = place.path[-1], list(place.section.model_fields)
    if place.section in place.branches:
        owners = [value for branch in place.branches if key in branch.model_fields for value in _tag(branch).values]
        if owners:
            return f"unknown key here; it belongs to {_tag(place.section).key}: {_either(owners, quoted=False)}"
    known = _OTHER_NAMES.get(key)
    hints = f". It is called '{known}' here" if known in allowed else _did_you_mean(key, allowed)
    homes = _distinct(_homes(key, schema), here=dotted(place.path[:-1]))
    if homes:
        hints += f"{'' if hints else '.'} '{key}' is a key of {_either(homes, quoted=False, word='and')}"
    return f"unknown key{hints or '. The keys here are ' + ', '.join(allowed)}"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where pydantic's location leads.

    Attributes:
        path: the location without the names of union branches.
        members: what may stand there.
        section: the section that holds the last key, or None in a list.
        branches: the last union on the way.
    """

    path: KeyPath
    members: tuple[Any, ...]
    section: type[Section] | None
    branches: tuple[type[Section], ...]


def _follow(location: Iterable[int | str], schema: type[Section]) -> _Place:
    path: KeyPath = ()
    members: tuple[Any, ...] = (schema,)
    section: type[Section] | None = None
    branches: tuple[type[Section], ...] = ()
    for item in map(str, location):
        if len(members) > 1:  # pydantic names the branch it took, by its tag or its type
            branches = tuple(member for member in members if _is_section(member))
            members = tuple(member for member in members if item in _branch_names(member))
            continue
        path = (*path, item)
        member = members[0] if members else None
        section = member if member is not None and _is_section(member) else None
        if section is not None:
            members = _members(section.model_fields[item].annotation) if item in section.model_fields else ()
        else:
            members = _members(get_args(member)[-1]) if get_origin(member) in (list, dict) else ()
    return _Place(path, members, section, branches)


def _branch_names(member: Any) -> tuple[str, ...]:
    if _is_section(member):
        return (member.__name__, *_tag(member).values)
    items = get_args(member)
    return (f"list[{items[0].__name__}]",) if get_origin(member) is list and _is_section(items[0]) else ()


@dataclass(frozen=True, slots=True)
class _Tag:
    """The key that tells a section from its alternatives, and its values for this one."""

    key: str
    values: tuple[str, ...]


def _tag(section: type[Section]) -> _Tag:
    for key, field in section.model_fields.items():
        if field.is_required() and get_origin(field.annotation) is Literal:
            return _Tag(key, get_args(field.annotation))
    return _Tag("", ())


def _is_section(member: Any) -> TypeGuard[type[Section]]:
    return isinstance(member, type) and issubclass(member, Section)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, without None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return tuple(member for part in get_args(annotation) for member in _members(part))
    return () if annotation is NoneType else (annotation,)


_IN_A_LIST = " (a list)"


def _distinct(homes: Iterable[str], *, here: str) -> list[str]:
    """Each section once and none as `here`; one of a list is left out where it has the key without a list too."""
    found = dict.fromkeys(homes)
    plain = {home for home in found if _IN_A_LIST not in home}
    return [home for home in found if home != here and (home in plain or home.replace(_IN_A_LIST, "") not in plain)]


def _homes(key: str, section: type[Section], path: KeyPath = ()) -> Iterable[str]:
    """Dotted names of the sections that have `key`."""
    if path and key in section.model_fields:
        yield dotted(path)
    for name, field in section.model_fields.items():
        for member in _members(field.annotation):
            if _is_section(member):
                yield from _homes(key, member, (*path, name))
            elif get_origin(member) is list and _is_section(item := get_args(member)[0]):
                yield from _homes(key, item, (*path, f"{name}{_IN_A_LIST}"))


def _choices(expected: str) -> list[str]:
    return re.findall(r"'([^']*)'", expected)


def _either(choices: Sequence[str], *, quoted: bool = True, word: str = "or") -> str:
    shown = [f"'{choice}'" if quoted else choice for choice in choices]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} {word} {shown[-1]}"


def _did_you_mean(value: Any, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
    return f". Did you mean '{close[0]}'?" if close else ""


def _show(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
