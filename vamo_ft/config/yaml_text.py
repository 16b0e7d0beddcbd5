"""Reading and writing YAML: safe, with line numbers, and plain scalars as in YAML 1.2.

YAML 1.1, which PyYAML follows, takes `1e-3` for text, `no` for false, `010` for eight and `1:30` for ninety. Here only
null, true, false and decimal numbers are more than text.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

__all__ = ["Document", "KeyPath", "dotted", "parse_yaml", "write_yaml", "write_yaml_value"]

KeyPath = tuple[str, ...]
"""Keys from the root to a value; positions in lists are written as numbers."""

_PREFIX = "tag:yaml.org,2002:"
_MERGE = _PREFIX + "merge"
_MAX_VALUES = 10_000  # nested aliases can grow a few lines to billions of values

_NOT_TEXT = re.compile(r"[\0\ud800-\udfff]")  # escapes can write what no file name, tokenizer or log takes

_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the attribute PyYAML reads


class _Dumper(yaml.SafeDumper):
    """Keeps YAML 1.1's resolvers as well, so that text which either version would misread is quoted."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


for _name, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_PREFIX + _name, re.compile(rf"^(?:{_pattern})$"), _first)

_ALLOWED_TAGS = {
    yaml.ScalarNode: {_PREFIX + name for name in ("null", "bool", "int", "float", "str")},
    yaml.SequenceNode: {_PREFIX + "seq"},
    yaml.MappingNode: {_PREFIX + "map"},
}


@dataclass(slots=True)
class Document:
    """Parsed YAML.

    Attributes:
        values: None where nothing is written.
        lines: line of every key and list item, counted from 1.
        problems: (line, text) of what may not be written; `values` is meaningless when there are any.
    """

    values: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)


def dotted(path: KeyPath) -> str:
    """`method.snapshot.every`."""
    return ".".join(path)


def parse_yaml(text: str) -> Document:
    """Parses one YAML document; problems are collected, not raised."""
    document = Document()
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is not None:
            document.values = _Builder(loader, document).build(root, ())
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        document.problems.append((line, f"the character {chr(error.character)!a} is not allowed in YAML"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        document.problems.append((mark.line + 1 if mark else 1, f"not valid YAML: {reason}"))
    except RecursionError:
        document.problems.append((1, "nested too deeply"))
    except _TooLargeError as error:
        document.problems.append((error.line, f"more than {_MAX_VALUES} values, aliases included"))
    return document


def write_yaml(values: Any) -> str:
    """Block-style YAML that `parse_yaml` reads back to equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def write_yaml_value(value: Any) -> str:
    """One value on one line."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6, default_flow_style=True)
    return text.removesuffix("...\n").strip()


class _TooLargeError(Exception):
    def __init__(self, line: int) -> None:
        self.line = line


class _Builder:
    """Turns nodes into values and notes the line of each."""

    def __init__(self, loader: _Loader, document: Document) -> None:
        self._loader = loader
        self._document = document
        self._num_values = 0

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self._num_values += 1
        if self._num_values > _MAX_VALUES:
            raise _TooLargeError(_line(node))
        if node.tag not in _ALLOWED_TAGS[type(node)]:
            tag = node.tag.replace(_PREFIX, "!!", 1)
            self._report(node, path, f"the YAML tag '{tag}' is not allowed; write a plain value")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._item(item, (*path, str(index))) for index, item in enumerate(node.value)]
        if _NOT_TEXT.search(node.value):
            self._report(node, path, "holds a NUL character or half of a surrogate pair, which are not text")
            return None
        try:
            return self._loader.construct_object(node)
        except (ValueError, LookupError):
            self._report(node, path, f"'{node.value}' cannot be read as {node.tag.removeprefix(_PREFIX)}")

    def _item(self, node: yaml.Node, path: KeyPath) -> Any:
        self._document.lines[path] = _line(node)
        return self.build(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                values.update(self._merged(value_node, path))
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self._report(key_node, path, "a key must be a plain word")
                continue
            key = self.build(key_node, path)
            key_path = (*path, str(key))
            if str(key) in first_lines:
                self._report(key_node, key_path, f"duplicate key, first written on line {first_lines[str(key)]}")
                continue
            first_lines[str(key)] = self._document.lines[key_path] = _line(key_node)
            values[key] = self.build(value_node, key_path)
        return values

    def _merged(self, node: yaml.Node, path: KeyPath) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        for source in reversed(node.value) if isinstance(node, yaml.SequenceNode) else [node]:
            if isinstance(source, yaml.MappingNode):
                values.update(self.build(source, path))
            else:
                self._report(source, path, "'<<' takes a mapping or a list of mappings")
        return values

    def _report(self, node: yaml.Node, path: KeyPath, text: str) -> None:
        self._document.problems.append((_line(node), f"{dotted(path)}: {text}" if path else text))


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
