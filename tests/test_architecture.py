"""Who may import what, and what no file may contain. A change of a table here is a change of the design."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path.relative_to(ROOT) for top in ("vamo_ft", "scripts", "tests") for path in (ROOT / top).rglob("*.py"))
PACKAGE = [path for path in FILES if path.parts[0] == "vamo_ft"]

METHOD = ("training", "objectives", "estimators", "optim")
BELOW_ASSEMBLE = ("core", "config", *METHOD, "data", "models")
LAYERS = {  # part of vamo_ft -> the parts that it may import
    "core": ("core",),
    "config": ("config",),
    "training": ("core", "training"),
    "objectives": ("core", "objectives"),
    "estimators": ("core", "estimators"),
    "optim": ("core", "optim"),
    "data": ("core", "config", "data"),
    "models": ("core", "config", "models"),
    "report": ("config", "report"),
    "assemble": (*BELOW_ASSEMBLE, "assemble", "__version__"),
    "studies": (*BELOW_ASSEMBLE, "assemble", "studies"),
    "commands": ("config", "core.errors", "training", "assemble", "studies", "report", "commands"),
    "arguments": ("commands", "__version__"),
    "cli": ("arguments", "commands"),
    "__main__": ("cli",),
    "__init__": (),
}
LIBRARIES = {  # library -> the parts of vamo_ft that may import it when they run
    "torch": ("core", *METHOD, "data", "models", "assemble", "studies"),
    "transformers": ("models", "data"),
    "peft": ("models", "data"),
    "datasets": ("models", "data"),
    "accelerate": ("training.runtime",),
    "rich": ("commands", "report", "training.progress"),
    "typer": ("arguments",),
    "matplotlib": ("report",),
    "sklearn": ("studies",),
    "wandb": ("training.tracker_clients",),
    "mlflow": ("training.tracker_clients",),
    "trackio": ("training.tracker_clients",),
}
LIGHT = (
    "arguments",
    "cli",
    "commands.validate",
    "commands.methods",
    "commands.init",
    "commands.report",
    "commands.settings",
)
HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate"}
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.load", "torch.save"}
PICKLES |= {"yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.UnsafeLoader", "yaml.FullLoader"}


@dataclass(frozen=True)
class Import:
    """One imported name with its module, such as `vamo_ft.core.errors.DataError`."""

    name: str
    line: int
    typing_only: bool
    at_top: bool


def imports_of(tree: ast.AST, *, typing_only: bool = False, at_top: bool = True) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, typing_only, at_top)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = "." * node.level + f"{node.module or ''}.{alias.name}"
                yield Import(name, node.lineno, typing_only, at_top)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from imports_of(ast.Module(node.body, []), typing_only=True, at_top=at_top)
            yield from imports_of(ast.Module(node.orelse, []), typing_only=typing_only, at_top=at_top)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_of(node, typing_only=typing_only, at_top=at_top and not inside)


def is_within(name: str, parts: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def import_problems(module: str, source: str) -> list[str]:
    """What the two tables forbid; `module` is the name below vamo_ft, such as `training.trainer`."""
    part = module.partition(".")[0]
    problems = []
    for found in imports_of(ast.parse(source)):
        top, _, rest = found.name.partition(".")
        if top == "":
            problems.append(f"{module}:{found.line}: relative import")
        elif top == "vamo_ft" and not is_within(rest, LAYERS[part]):
            problems.append(f"{module}:{found.line}: {part} may not import {found.name}")
        elif top in LIBRARIES and not found.typing_only and not is_within(module, LIBRARIES[top]):
            problems.append(f"{module}:{found.line}: {module} may not import {top}")
    return problems


def content_problems(path: Path, source: str) -> list[str]:
    """What is forbidden in any file, or in any file of the package."""
    tree = ast.parse(source)
    problems = []
    if len(source.splitlines()) > 400:
        problems.append(f"{path}: has more than 400 lines")
    if path.name == "utils.py":
        problems.append(f"{path}: says nothing about what is in it")
    if path.parts[0] != "vamo_ft":
        return problems
    problems += [
        f"{path}:{found.line}: {found.name} may run code from a file"
        for found in imports_of(tree)
        if is_within(found.name, tuple(PICKLES))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            problems.append(f"{path}:{node.lineno}: global state")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in PICKLES:
            problems.append(f"{path}:{node.lineno}: {ast.unparse(node)} may run code from a file")
        elif isinstance(node, ast.arguments) and node.kwarg is not None and not is_typed(node.kwarg):
            problems.append(f"{path}:{node.kwarg.lineno}: **{node.kwarg.arg} hides what may be passed")
    return problems


def is_typed(kwarg: ast.arg) -> bool:
    """Whether a type checker knows the keys: `Unpack[SomeTypedDict]` or a `ParamSpec`'s `.kwargs`."""
    annotation = "" if kwarg.annotation is None else ast.unparse(kwarg.annotation)
    return annotation.startswith("Unpack[") or annotation.endswith(".kwargs")


def loaded_with(module: str) -> set[str]:
    """Every module whose import runs when `vamo_ft.<module>` is imported, found without running any."""
    waiting, loaded = [f"vamo_ft.{module}"], set[str]()
    while waiting:
        name = waiting.pop()
        parents = name.split(".")
        for size in range(1, len(parents) + 1):
            current = ".".join(parents[:size])
            if current not in loaded:
                loaded.add(current)
                if (path := path_of(current)) is not None:
                    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
                    waiting += [found.name for found in imports_of(tree) if found.at_top and not found.typing_only]
    return loaded


def path_of(module: str) -> Path | None:
    base = Path(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path in PACKAGE), None)


def module_name(path: Path) -> str:
    name = ".".join(path.with_suffix("").parts[1:])
    return name if name == "__init__" else name.removesuffix(".__init__")


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_imports_follow_the_layers(path: Path) -> None:
    assert import_problems(module_name(path), (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_hold_nothing_forbidden(path: Path) -> None:
    assert content_problems(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("module", [module for module in LIGHT if path_of(f"vamo_ft.{module}")])
def test_light_commands_load_no_heavy_library(module: str) -> None:
    assert {name.partition(".")[0] for name in loaded_with(module)} & HEAVY == set()


def test_heavy_libraries_are_seen_through_other_modules() -> None:
    assert "torch" in loaded_with("estimators.vamo")
    assert "vamo_ft.core.hashing" in loaded_with("estimators.vamo")


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("core.types", "from vamo_ft.config import schema", "core.types:1: core may not import vamo_ft.config.schema"),
        ("core.types", "from vamo_ft import data", "core.types:1: core may not import vamo_ft.data"),
        (
            "optim.rules",
            "def f():\n    import vamo_ft.training",
            "optim.rules:2: optim may not import vamo_ft.training",
        ),
        (
            "data.rows",
            "if TYPE_CHECKING:\n    from vamo_ft.models import loading",
            "data.rows:2: data may not import vamo_ft.models.loading",
        ),
        (
            "commands.train",
            "from vamo_ft.core.types import Batch",
            "commands.train:1: commands may not import vamo_ft.core.types.Batch",
        ),
        (
            "training.trainer",
            "import transformers.utils",
            "training.trainer:1: training.trainer may not import transformers",
        ),
        ("config.schema", "import torch", "config.schema:1: config.schema may not import torch"),
        ("data.rows", "from . import order", "data.rows:1: relative import"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str, problem: str) -> None:
    assert import_problems(module, source) == [problem]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("training.trainer", "if TYPE_CHECKING:\n    from transformers import PreTrainedModel"),
        ("commands.train", "from vamo_ft.core.errors import DataError\nfrom vamo_ft.training import rundir"),
        ("arguments", "import typer\nfrom vamo_ft import __version__"),
        ("core.types", "import torchvision, datasets_of_mine"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert import_problems(module, source) == []


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("x = 1\n" * 401, "vamo_ft/a.py: has more than 400 lines"),
        ("import torch\ntorch.save(1, 'f')", "vamo_ft/a.py:2: torch.save may run code from a file"),
        ("from torch import load", "vamo_ft/a.py:1: torch.load may run code from a file"),
        ("import yaml\nyaml.load(x)", "vamo_ft/a.py:2: yaml.load may run code from a file"),
        ("def f():\n    global x", "vamo_ft/a.py:2: global state"),
        ("def f(a, **rest: int): ...", "vamo_ft/a.py:1: **rest hides what may be passed"),
    ],
)
def test_forbidden_content_is_found(source: str, problem: str) -> None:
    assert content_problems(Path("vamo_ft/a.py"), source) == [problem]
    assert content_problems(Path("vamo_ft/utils.py"), "")
    assert content_problems(Path("vamo_ft/a.py"), "def f(**rest: Unpack[Options]): ...") == []
