"""Model cards: what a folder holds, how it came about, and what was measured, with the metadata that the Hub reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os.path import exists
from pathlib import Path

import yaml
from huggingface_hub import ModelCardData, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

__all__ = ["Card", "write_model_card"]


@dataclass(frozen=True, slots=True)
class Card:
    """What a model card says.

    Attributes:
        title: the heading.
        base_model: path or Hub id of the model that training began with; None: unknown.
        data_sets: paths or Hub ids of the training data.
        tags: besides `vamo-ft`.
        facts: rows of the first table.
        evaluations: metric -> value before training and in this folder's model; None: not evaluated there.
        config: the run's configuration as YAML text; None: it is not shown.
    """

    title: str
    base_model: str | None = None
    data_sets: Sequence[str] = ()
    tags: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    evaluations: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    config: str | None = None


def write_model_card(directory: Path, card: Card) -> None:
    """Writes `README.md` beside what `save_model` wrote.

    The metadata name the base model and the data sets only where they are from the Hub, which knows no other; the
    licence is that of the base model's own card, if that is on this machine.
    """
    adapter = (directory / "adapter_config.json").exists()
    if adapter:
        use = "An adapter: load the base model with transformers, then `PeftModel.from_pretrained(model, folder)`."
    else:
        use = "Loads with `from_pretrained` of transformers."
    parts = [
        f"---\n{_metadata(card, adapter=adapter)}\n---",
        f"# {card.title}",
        f"Fine-tuned with vamo-ft. {use}",
        _table(["", ""], [[name, value] for name, value in card.facts.items()]),
    ]
    if card.evaluations:
        rows = [[name, *map(_figure, values)] for name, values in card.evaluations.items()]
        parts.append(_table(["evaluation", "before training", "this model"], rows))
    if card.config is not None:
        parts += ["## Configuration", f"```yaml\n{card.config.strip()}\n```"]
    (directory / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _metadata(card: Card, *, adapter: bool) -> str:
    base = card.base_model if card.base_model is not None and _is_hub_id(card.base_model) else None
    data_sets = [name for name in card.data_sets if _is_hub_id(name)]
    data = ModelCardData(
        base_model=base,
        datasets=data_sets or None,
        library_name="peft" if adapter else "transformers",
        tags=["vamo-ft", *card.tags],
    )
    if base is not None:
        data["base_model_relation"] = "adapter" if adapter else "finetune"
    if card.base_model is not None:
        for key, value in _license_of(card.base_model).items():
            data[key] = value
    text: str = data.to_yaml()
    return text.strip()


def _license_of(base: str) -> dict[str, str]:
    """`license`, and what belongs to a license of another name, from the card of a model on this machine."""
    path = Path(base) / "README.md"
    if not exists(path):
        try:
            cached = try_to_load_from_cache(base, "README.md")
        except HFValidationError:
            return {}
        if not isinstance(cached, str):
            return {}
        path = Path(cached)
    try:
        metadata = metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError):  # somebody else's card, which is of no further use
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: metadata[key] for key in keys if isinstance(metadata.get(key), str)}


def _is_hub_id(name: str) -> bool:
    """Whether `name` has the form `owner/name`, and is no path here."""
    try:
        try_to_load_from_cache(name, "README.md")
    except HFValidationError:
        return False
    return "/" in name and not exists(name)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
