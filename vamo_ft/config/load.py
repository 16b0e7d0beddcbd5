"""From a file to a `RunConfig` or an `ExperimentConfig`, with every problem named by file, line and key."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from vamo_ft.config.arms import Arm, arm_values, candidates
from vamo_ft.config.compare import leaves
from vamo_ft.config.errors import ConfigError
from vamo_ft.config.paper import ExperimentConfig, arm_run
from vamo_ft.config.presets import preset_values
from vamo_ft.config.problems import Problem, find_problems
from vamo_ft.config.schema import RunConfig
from vamo_ft.config.section import Section
from vamo_ft.config.yaml_text import KeyPath, dotted, parse_yaml, write_yaml

__all__ = ["LoadedConfig", "dump_config", "load_config", "load_experiment", "resolved_values"]

_OVERRIDE = "--set"

Schema = TypeVar("Schema", bound=Section)


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A valid configuration.

    Attributes:
        config: every key resolved.
        sources: dotted key of every value -> `config.yaml:12`, `--set`, `preset mezo` or `default`.
        arms: the methods of its `compare` section.
    """

    config: RunConfig
    sources: Mapping[str, str]
    arms: Sequence[Arm] = ()


def load_config(path: Path, *, overrides: Sequence[str] = (), methods: Sequence[str] = ()) -> LoadedConfig:
    """Reads, overrides, presets and validates.

    An override wins over the file, the file over what the method's name presets, and that over the schema's default.

    Args:
        overrides: `method.probes=4`; the value is YAML.
        methods: labels in the `compare` section, which then has no others; new ones are added. Empty: as written.

    Raises:
        ConfigError: with all problems found, in the order of their lines.
    """
    draft = _read(path)
    for override in overrides:
        draft.override(override)
    if methods:
        draft.choose(methods)
    raw = copy.deepcopy(draft.values)
    draft.preset()
    config = draft.validated(RunConfig)
    sources = {dotted(leaf): draft.source(leaf) for leaf, _ in leaves(_plain(config))}
    return LoadedConfig(config, sources, draft.arms(config, raw))


def load_experiment(path: Path, *, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads, overrides and validates a synthetic experiment; method names preset nothing there.

    Raises:
        ConfigError: with all problems found, in the order of their lines.
    """
    draft = _read(path)
    for override in overrides:
        draft.override(override)
    experiment = draft.validated(ExperimentConfig)
    for number, arm in enumerate(experiment.arms):
        try:
            arm_run(experiment, arm, seed=experiment.tuning_seed, learning_rate=arm.learning_rates[0])
        except ValidationError as error:
            for problem in find_problems(error, schema=RunConfig):
                draft.problems.append(draft.locate(Problem(("arms", str(number), *problem.path), problem.text)))
    draft.raise_problems()
    return experiment


def dump_config(config: RunConfig) -> str:
    """YAML of the resolved configuration; loading it gives an equal one."""
    return write_yaml(_plain(config))


def resolved_values(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> plain value, for every value of the configuration; a list of anything but sections is one value."""
    return {dotted(path): value for path, value in leaves(_plain(config))}


@dataclass(slots=True)
class _Draft:
    """Raw values and where each comes from, before validation.

    Attributes:
        label: the file, as the user wrote it.
        lines: line of every key that the file's values have.
        written: where keys outside the file come from: `--set` or a preset.
        problems: (line or None, message).
    """

    label: str
    values: dict[Any, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    written: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[tuple[int | None, str]] = field(default_factory=list)

    def override(self, text: str) -> None:
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(re.fullmatch(r"[^\s.\0\ud800-\udfff]+", part) for part in path):
            shown = " ".join(text.split())
            self.problems.append((None, f"{_OVERRIDE} {shown}: write it as key=value, such as method.probes=4"))
            return
        document = parse_yaml(value)
        if document.problems:
            self.problems.extend((None, f"{_OVERRIDE} {dotted(path)}: {problem}") for _, problem in document.problems)
            return
        self._put(path, document.values, source=_OVERRIDE)
        self.written.update({(*path, *inner): _OVERRIDE for inner in document.lines})

    def preset(self) -> None:
        method = self.values.get("method")
        for key, value in preset_values(self.values).items():
            path = tuple(key.split("."))
            if _is_open(self.values, path):
                assert isinstance(method, Mapping)
                self._put(path, value, source=f"preset {method['name']}")

    def choose(self, methods: Sequence[str]) -> None:
        """Leaves these labels in the `compare` section, and adds those that are new."""
        compare = self.values.get("compare")
        written = compare.get("methods") if isinstance(compare, Mapping) else None
        known = written if isinstance(written, Mapping) else {}
        self._put(("compare", "methods"), {label: known.get(label) for label in methods}, source="--methods")

    def arms(self, config: RunConfig, raw: Mapping[str, Any]) -> list[Arm]:
        """The methods that are compared; `raw` are the values before presets."""
        arms = []
        for label, arm in config.compare.methods.items() if config.compare is not None else ():
            path = ("compare", "methods", label)
            try:
                rates = candidates(raw, label, arm)
                run = RunConfig.model_validate(arm_values(raw, label, arm, learning_rate=rates[0]))
                arms.append(Arm(label, run, rates))
            except ValidationError as error:  # a ValueError, too
                for problem in find_problems(error, schema=RunConfig):
                    text = f"{dotted(problem.path)}: {problem.text}" if problem.path else problem.text
                    self.problems.append(self.locate(Problem(path, text)))
            except ValueError as error:
                self.problems.append(self.locate(Problem(path, str(error))))
        self.raise_problems()
        return arms

    def validated(self, schema: type[Schema]) -> Schema:
        try:
            config = schema.model_validate(self.values)
        except ValidationError as error:
            told = {line for line, _ in self.problems if line is not None}  # what has no value would be called null
            located = map(self.locate, find_problems(error, schema=schema))
            self.problems.extend(problem for problem in located if problem[0] not in told)
            self.raise_problems()
            raise AssertionError("a validation error without problems") from error
        self.raise_problems()
        return config

    def source(self, path: KeyPath) -> str:
        if path in self.written:
            return self.written[path]
        return f"{self.label}:{self.lines[path]}" if path in self.lines else "default"

    def locate(self, problem: Problem) -> tuple[int | None, str]:
        text = f"{dotted(problem.path)}: {problem.text}" if problem.path else problem.text
        if self.written.get(problem.path) == _OVERRIDE:
            return None, f"{_OVERRIDE} {text}"
        for length in range(len(problem.path), 0, -1):
            line = self.lines.get(problem.path[:length])
            if line is not None:
                return line, f"{self.label}:{line}: {text}"
        return None, f"{self.label}: {text}"

    def raise_problems(self) -> None:
        if self.problems:
            ordered = sorted(self.problems, key=lambda problem: (problem[0] is None, problem[0] or 0))
            raise ConfigError([text for _, text in ordered])

    def _put(self, path: KeyPath, value: Any, *, source: str) -> None:
        parent: Any = self.values
        for length, key in enumerate(path[:-1], start=1):
            child = parent[_place(parent, key)] if _holds(parent, key) else None
            if not isinstance(child, dict) and not (isinstance(child, list) and _holds(child, path[length])):
                child = parent[_place(parent, key)] = {}
                self.written[path[:length]] = source
            parent = child
        parent[_place(parent, path[-1])] = value
        for origins in (self.lines, self.written):
            for inner in [known for known in origins if known[: len(path)] == path]:
                del origins[inner]
        self.written[path] = source


def _read(path: Path) -> _Draft:
    draft = _Draft(str(path))
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file; 'vamo-ft init' writes one to start from"]) from None
    except IsADirectoryError:
        raise ConfigError([f"{path}: this is a folder; name the configuration file"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{path}:{line}: not UTF-8 text; save the file as UTF-8"]) from None
    document = parse_yaml(text)
    draft.lines = document.lines
    draft.problems = [(line, f"{path}:{line}: {problem}") for line, problem in document.problems]
    if not isinstance(document.values, dict):
        draft.raise_problems()
    if document.values is None:
        raise ConfigError([f"{path}: the file is empty; 'vamo-ft init' writes one to start from"])
    if not isinstance(document.values, dict):
        raise ConfigError([f"{path}: must hold sections such as 'run:' and 'model:' at the top"])
    draft.values = document.values
    return draft


def _holds(values: dict[Any, Any] | list[Any], key: str) -> bool:
    """Whether there is a value under a key, or at a position in a list."""
    return key in values if isinstance(values, dict) else key.isdecimal() and int(key) < len(values)


def _place(values: dict[Any, Any] | list[Any], key: str) -> str | int:
    return key if isinstance(values, dict) else int(key)


def _is_open(values: Any, path: KeyPath) -> bool:
    """Whether `path` can be set without touching anything written."""
    for key in path:
        if not isinstance(values, Mapping):
            return False
        if key not in values:
            return True
        values = values[key]
    return False


def _plain(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")
