from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from vamo_ft.models.card import Card, write_model_card


def metadata(directory: Path, card: Card) -> dict[str, object]:
    write_model_card(directory, card)
    head = (directory / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    values = yaml.safe_load(head)
    assert ModelCard.load(directory / "README.md").data.to_dict() == values, "the Hub reads the same"
    return values


def test_the_text(tmp_path: Path) -> None:
    card = Card(
        "sst2-vamo",
        facts={"configuration": "configs/sst2.yaml", "peak": "1 | 2\n3"},
        evaluations={"loss": (2.0, 0.5), "f1": (None, 0.25)},
        config="run:\n  name: sst2-vamo\n",
    )
    assert metadata(tmp_path, card) == {"library_name": "transformers", "tags": ["vamo-ft"]}
    text = (tmp_path / "README.md").read_text()
    assert "\n\n# sst2-vamo\n" in text
    assert "| configuration | configs/sst2.yaml |\n| peak | 1 \\| 2 3 |\n" in text
    assert "| evaluation | before training | this model |\n| --- | --- | --- |\n| loss | 2.0000 | 0.5000 |\n" in text
    assert "| f1 |  | 0.2500 |" in text
    assert "```yaml\nrun:\n  name: sst2-vamo\n```" in text
    assert "PeftModel" not in text


def test_the_metadata_name_what_is_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_config.json").touch()
    card = Card(
        "a",
        base_model="HuggingFaceTB/SmolLM2-135M",
        data_sets=["stanfordnlp/sst2", "rows.jsonl", "nyu-mll/glue"],
        tags=["vamo", "lora"],
    )
    assert metadata(out, card) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "base_model_relation": "adapter",
        "datasets": ["stanfordnlp/sst2", "nyu-mll/glue"],
        "library_name": "peft",
        "tags": ["vamo-ft", "vamo", "lora"],
    }
    assert "PeftModel.from_pretrained" in (out / "README.md").read_text()
    (tmp_path / "runs" / "base").mkdir(parents=True)
    for local in ("runs/base", "data/quickstart/model", "model", "./model", "model.gguf"):
        assert "base_model" not in metadata(out, Card("a", base_model=local))


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: other\nlicense_name: ours\ntags: [x]\n---\ntext", {"license": "other", "license_name": "ours"}),
        ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
        ("no metadata", {}),
        ("---\nlicense: [apache\n---\n", {}),
        ("---\nlicense: [a, b]\n---\n", {}),
    ],
)
def test_the_license_is_that_of_the_base(tmp_path: Path, card: str, expected: dict[str, str]) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(card)
    found = metadata(tmp_path, Card("a", base_model=str(base)))
    assert {key: value for key, value in found.items() if key.startswith("license")} == expected
