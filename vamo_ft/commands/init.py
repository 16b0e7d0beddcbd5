"""`vamo-ft init`: a commented configuration to start from."""

import difflib
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vamo_ft.commands.data_format import format_of
from vamo_ft.config.method import METHOD_NAMES
from vamo_ft.config.presets import with_presets
from vamo_ft.config.schema import RunConfig
from vamo_ft.config.section import Section
from vamo_ft.config.starters import STARTERS
from vamo_ft.config.yaml_text import write_yaml_value
from vamo_ft.core.errors import UsageError

__all__ = ["init", "starter_config"]

_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SST2: Mapping[str, Any] = {  # a part, so that a snapshot pass is short
    "train": {"path": "stanfordnlp/sst2", "split": "train", "limit": 2000},
    "evaluation": {"path": "stanfordnlp/sst2", "split": "validation", "limit": 200},
    "format": {
        "type": "classification",
        "template": "{sentence} It was",
        "label": "label",
        "labels": {0: " terrible", 1: " great"},
    },
}


def init(*, method: str, out: Path, model: str = _MODEL, data: str | None = None) -> None:
    """Writes a configuration that trains as it is: on the Hub's SST-2, or on `data`, whose columns tell its format.

    Raises:
        UsageError: there is no such method, `data` cannot be read or fits no format, or the file exists or cannot be
            written.
    """
    if method not in METHOD_NAMES:
        close = difflib.get_close_matches(method, METHOD_NAMES, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"choose one of {', '.join(METHOD_NAMES)}"
        raise UsageError(f"--method {method}: no such method; {hint}")
    text = starter_config(method, model=model, data=data)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{out}: exists already; name another file with --out") from None
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}") from None
    print(f"wrote {out}\nnext:  vamo-ft train {out}")


def starter_config(method: str, *, model: str = _MODEL, data: str | None = None) -> str:
    """The file's text; every comment is the schema's own description of the key."""
    values = _values(method, model=model, data=data)
    subject = "tell good reviews from bad ones" if data is None else f"learn {data}"
    lines = [
        f"# Trains {'a LoRA adapter' if STARTERS[method].adapter else 'the weights'} to {subject}.",
        "# 'vamo-ft validate' lists every key with its default and where each value comes from.",
        *_lines(RunConfig.model_validate(with_presets(values)), values, indent=""),
    ]
    return "\n".join(lines) + "\n"


def _values(method: str, *, model: str, data: str | None) -> dict[str, Any]:
    choice = STARTERS[method]
    adapter = {"adapter": {"type": "lora", "r": 8, "alpha": 16.0, "target_modules": "all-linear"}}
    period = f"{choice.steps // 10} steps"
    return {
        "run": {"name": f"{method.replace('_', '-')}{'-lora' if choice.adapter else ''}", "seed": 42},
        "model": {"path": model, **(adapter if choice.adapter else {})},
        "data": {**(_SST2 if data is None else _data_at(data)), "max_length": 256},
        "method": {"name": method, **choice.method},
        "optimizer": {"name": choice.optimizer, "learning_rate": choice.learning_rate},
        "schedule": choice.schedule,
        "training": {"steps": choice.steps, "batch_size": 16},
        **({"evaluation": {"every": period, "metrics": ["loss", "accuracy"]}} if data is None else {}),
        "checkpoint": {"every": period, "keep": 2},
    }


def _data_at(path: str) -> dict[str, Any]:
    return {"train": {"path": path}, "format": format_of(path)}


def _lines(section: Section, values: Mapping[str, Any], *, indent: str) -> Iterator[str]:
    for key, value in values.items():
        child = getattr(section, key)
        about = type(section).model_fields[key].description or inspect.getdoc(child)
        assert about is not None
        if not indent:
            yield ""
        yield from textwrap.wrap(
            about.splitlines()[0], width=100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        if isinstance(child, Section):
            yield f"{indent}{key}:"
            yield from _lines(child, value, indent=indent + "  ")
        else:
            yield f"{indent}{key}: {write_yaml_value(value)}"
