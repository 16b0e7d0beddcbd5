"""What `vamo-ft export` writes besides the weights' values: precision, shards, card, templates, and an upload."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import RepoUrl
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import save_model_folder, tiny_llama
from tests.workspace import LORA, MEZO, Workspace, export, merged, weights_in
from vamo_ft.models import hub
from vamo_ft.models.export import shard_bytes


@pytest.fixture
def trained(workspace: Workspace) -> Workspace:
    """A run with an adapter, on a base with a chat template, generation settings and a licence."""
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained("model")
    settings = Path("model/generation_config.json")
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "repetition_penalty": 1.5}))
    Path("model/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    workspace.configure({"model": {"adapter": LORA}, "optimizer": {"learning_rate": 0.05}})
    assert workspace.train() == 0
    return workspace


def logits(folder: str) -> torch.Tensor:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merged_model_in_another_precision(
    trained: Workspace, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("runs/tiny", "whole", "--merge") == 0
    assert "rounded" not in capsys.readouterr().err
    assert export("runs/tiny", "low", "--merge", "--dtype", dtype) == 0
    assert f"once rounded to {dtype}" in capsys.readouterr().err
    whole, low = weights_in(Path("whole")), weights_in(Path("low"))
    assert whole.keys() == low.keys()
    assert all(torch.equal(low[name], whole[name].to(getattr(torch, dtype))) for name in whole)
    assert json.loads(Path("low/config.json").read_text())["dtype"] == dtype
    difference = (logits("low") - logits("whole")).abs().max() / logits("whole").abs().max()
    assert 0 < difference < 2e-2


def test_shards(trained: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("runs/tiny", "whole", "--merge") == 0
    assert [path.name for path in Path("whole").glob("*.safetensors")] == ["model.safetensors"]
    assert export("runs/tiny", "parts", "--merge", "--max-shard-size", "50KB") == 0
    files = sorted(Path("parts").glob("*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 50_000 + 4_000 for path in files)
    assert torch.equal(logits("parts"), logits("whole"))
    trained.configure(MEZO)
    assert trained.train("--fresh") == 0
    assert export("runs/tiny-2", "full", "--max-shard-size", "50KB") == 0
    assert len(list(Path("full").glob("*.safetensors"))) == len(files)
    assert torch.equal(logits("full"), logits("runs/tiny-2/model"))
    assert export("runs/tiny-2", "low", "--dtype", "bfloat16") == 0
    assert {tensor.dtype for tensor in weights_in(Path("low")).values()} == {torch.bfloat16}


def test_sizes() -> None:
    assert [shard_bytes(size) for size in ("5GB", "500mb", "7KB", "1TB")] == [5 * 10**9, 5 * 10**8, 7000, 10**12]


def test_template_and_generation_settings_stay(trained: Workspace) -> None:
    assert export("runs/tiny", "adapter") == 0
    assert export("runs/tiny", "whole", "--merge") == 0
    for folder in ("adapter", "whole"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages }}"
    assert json.loads(Path("whole/generation_config.json").read_text())["repetition_penalty"] == 1.5


def test_the_card_tells_the_run(trained: Workspace) -> None:
    assert export("runs/tiny", "whole", "--merge") == 0
    assert export("runs/tiny/checkpoints/step-00000006", "six") == 0
    lines = [line for line in trained.metrics() if "eval.loss" in line]
    text = Path("whole/README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1]) == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "tags": ["vamo-ft", "adamw", "lora"],
    }
    assert f"| loss | {lines[0]['eval.loss']:.4f} | {lines[-1]['eval.loss']:.4f} |" in text
    assert f"| accuracy | {lines[0]['eval.accuracy']:.4f} | {lines[-1]['eval.accuracy']:.4f} |" in text
    for row in (
        "| base model | model |",
        "| training data | train.jsonl |",
        "| optimizer | adamw, learning rate 0.05 |",
        "| steps | 8 of 6 samples |",
        "| forward sample evaluations | 48 |",
        "| device | cpu |",
        "| merged | logits differ by at most",
    ):
        assert row in text
    assert "peak memory" in text
    assert f"torch {torch.__version__}" in text
    config = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(config) == yaml.safe_load((trained.directory() / "config.yaml").read_text())
    six = Path("six/README.md").read_text()
    assert "| steps | 6 of 6 samples |" in six
    assert f"| loss | {lines[0]['eval.loss']:.4f} |  |" in six, "nothing was evaluated there"
    assert yaml.safe_load(six.split("---\n")[1])["library_name"] == "peft"
    final = (trained.directory() / "model" / "README.md").read_text()
    assert f"| loss | {lines[0]['eval.loss']:.4f} | {lines[-1]['eval.loss']:.4f} |" in final


class StandIn:
    """A client of the Hub that takes notes."""

    calls: list[tuple[str, dict[str, Any]]]
    error: Exception | None = None

    def create_repo(self, repo: str, **options: Any) -> RepoUrl:
        if self.error is not None:
            raise self.error
        self.calls.append((repo, options))
        return RepoUrl(f"https://huggingface.co/{repo}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        files = sorted(path.name for path in folder_path.iterdir())
        self.calls.append((repo_id, {"files": files, "message": commit_message}))


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    stand_in = type("Client", (StandIn,), {"calls": []})
    monkeypatch.setattr(hub, "HfApi", stand_in)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    return stand_in


def test_an_upload(trained: Workspace, client: type[StandIn], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert export("runs/tiny", "out", "--push-to-hub", "me/tiny", "--private") == 0
    output = capsys.readouterr()
    assert output.out == "model: out\nhub:   https://huggingface.co/me/tiny\n"
    (repo, options), (target, upload) = client.calls
    assert (repo, options) == ("me/tiny", {"private": True, "exist_ok": True})
    assert target == "me/tiny"
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= set(upload["files"])
    assert upload["files"] == sorted(path.name for path in Path("out").iterdir())
    assert "abcdefghij" not in output.out + output.err


def test_the_card_shows_no_secret(trained: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_PASSWORD", "train.jsonl")  # stands in the configuration
    assert export("runs/tiny", "out") == 0
    assert "| training data | *** |" in Path("out/README.md").read_text()
    assert "train.jsonl" not in Path("out/README.md").read_text()


def test_an_upload_that_fails_leaves_the_folder(
    trained: Workspace, client: type[StandIn], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client, "error", ConnectionError("no route to host"))
    assert export("runs/tiny", "out", "--push-to-hub", "me/tiny") == 2
    assert "me/tiny could not be uploaded: no route to host; the model is in out" in capsys.readouterr().err
    assert Path("out/adapter_model.safetensors").is_file()
    assert issubclass(HfHubHTTPError, OSError), "what the client raises is caught too"


def test_what_cannot_be_written_is_refused_before_any_work(
    trained: Workspace, client: type[StandIn], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    for arguments, message in (
        (("--dtype", "bfloat16"), "--dtype: an adapter stays in float32"),
        (("--dtype", "int8", "--merge"), "'int8' is not one of"),
        (("--merge", "--max-shard-size", "5 apples"), "--max-shard-size: must be a whole number of KB, MB, GB or TB"),
        (("--merge", "--max-shard-size", "0GB"), "--max-shard-size: must be a whole number"),
        (("--max-shard-size", "big"), "--max-shard-size: must be a whole number"),
        (("--private",), "--private: needs --push-to-hub"),
        (("--push-to-hub", "tiny"), "names no owner; write OWNER/tiny"),
        (("--push-to-hub", "a/b/c"), "--push-to-hub: "),
        (("--push-to-hub", "me/tiny", "--set", "run.offline=true"), "--push-to-hub: no network call is made"),
    ):
        assert export("runs/tiny", "out", *arguments) == 2, arguments
        assert message in capsys.readouterr().err
        assert not Path("out").exists()
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert export("runs/tiny", "out", "--push-to-hub", "me/tiny") == 2
    assert "there is no token; set HF_TOKEN" in capsys.readouterr().err
    assert client.calls == []


def test_a_run_without_its_files_still_has_a_card(trained: Workspace) -> None:
    (trained.directory() / "environment.json").write_text("[")
    (trained.directory() / "metrics.jsonl").write_bytes(b'\xff\n{"step": 1}\n')
    (trained.directory() / "status.json").unlink()
    save_model_folder(Path("unused"), tiny_llama())
    assert export("runs/tiny", "out") == 0
    assert "| steps | 8 of 6 samples |" in Path("out/README.md").read_text()


def test_the_card_of_the_best_model(workspace: Workspace) -> None:
    best = {"evaluation": {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}}
    workspace.configure(merged(best, {"model": {"adapter": LORA}, "optimizer": {"learning_rate": 1e-9}}))
    assert workspace.train() == 0
    for folder in ("runs/tiny/model", "out"):
        if folder == "out":
            assert export("runs/tiny", "out") == 0
        assert "| steps | 4 of 6 samples |" in Path(folder, "README.md").read_text(), "equal ones: the first"
