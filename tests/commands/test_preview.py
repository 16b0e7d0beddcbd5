import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from tests.chats import INSTRUCTIONS
from tests.tiny import byte_tokenizer, write_jsonl
from tests.workspace import Workspace, base_config, merged
from vamo_ft.assemble.preview import Piece, build_preview
from vamo_ft.cli import run
from vamo_ft.commands import preview as command
from vamo_ft.config.load import load_config
from vamo_ft.data.order import SampleOrder

EVIL = "\x1b[31mred\u202e [bold]é[/bold]\n"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(tmp_path)
    workspace = Workspace(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()  # the weights are not needed
    return workspace


def configure(workspace: Workspace, data: dict[str, Any], **changes: Any) -> None:
    config = base_config()
    del config["data"]["format"]
    config["evaluation"]["metrics"] = ["loss"]
    text = yaml.safe_dump(merged(config, {"data": data, **changes}))
    (workspace.root / "config.yaml").write_text(text, encoding="utf-8")


def preview(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert run(["preview", "config.yaml", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_classification(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.configure()
    lines = preview(capsys, "-n", "1")
    first = SampleOrder(20, batch_size=6, seed=3).step_indices(0)[0]
    row = json.loads((workspace.root / "train.jsonl").read_text().splitlines()[first])
    prompt, answer = f"{row['sentence']} It was"[-43:], [" bad", " fine"][row["label"]]
    assert lines[0] == (
        f"sample {first}: {len(prompt + answer)} tokens, {len(answer)} of them learnt, class {row['label']}"
    )
    assert lines[1] == f"  from    train.jsonl:{first + 1}"
    assert lines[2] == f"  text    {prompt}[[{answer}]]"
    assert lines[3] == f"  tokens  {'|'.join(prompt)}|[[{'|'.join(answer)}]]"


def test_figures_of_the_data(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["x" * (3 + index) for index in range(41)]
    write_jsonl(workspace.root / "train.jsonl", [{"text": text} for text in [*texts, ""]])
    write_jsonl(workspace.root / "eval.jsonl", [{"text": "abc"}])
    configure(workspace, {"format": {"type": "text"}, "max_length": 42}, training={"batch_size": 4})
    lines = preview(capsys, "-n", "0")
    lengths = [min(len(text) + 1, 42) for text in texts]
    order = SampleOrder(41, batch_size=4, seed=3)
    batches = [[lengths[index] - 1 for index in order.step_indices(step)] for step in range(11)]
    cells, read = sum(4 * max(batch) for batch in batches), sum(map(sum, batches))
    assert lines == [
        f"training data: 41 samples, {sum(lengths)} tokens, {sum(lengths) - 41} of them learnt",
        "  samples cut to data.max_length: 2; rows left out: 1",
        "  tokens of a sample: 4 to 42, median 24, 95 % within 42",
        *(f"  {low:>2} to {low + 3:>2}         4  {'#' * 32}" for low in range(4, 40, 4)),
        f"  40 to 42         5  {'#' * 40}",
        f"  padding: {1 - read / cells:.1%} of micro-batches of 4",
        f"  steps: 10.2 of 4 samples to an epoch; the run's 8 are {32 / 41:.2f} epochs",
        "evaluation data: 1 samples, 4 tokens, 3 of them learnt",
        "  samples cut to data.max_length: 0; rows left out: 0",
        "  tokens of a sample: 4 to 4, median 4, 95 % within 4",
        f"  4 to 4         1  {'#' * 40}",
        "  padding: 0.0% of batches sorted by length",
    ]


def test_packed_conversations_without_anything_a_terminal_obeys(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL.strip()}]
    for file in ("train.jsonl", "eval.jsonl"):
        write_jsonl(workspace.root / file, [{"messages": messages}] * 4)
    data = {"format": {"type": "chat"}, "chat_template": INSTRUCTIONS, "packing": True, "max_length": 180}
    configure(workspace, data)
    lines = preview(capsys)
    shown = r"\x1b[31mred\u202e [bold]é[/bold]"
    assert lines[0].endswith(", 2 documents")
    first = SampleOrder(2, batch_size=6, seed=3).step_indices(0)[0]  # of rows 1 and 2, and of 3 and 4
    assert lines[1] == f"  from    train.jsonl:{2 * first + 1}"
    assert lines[2] == rf"  text    <s>[INST] {shown}\n [/INST][[ {shown}</s>]]"
    assert lines[4] == f"  from    train.jsonl:{2 * first + 2}"
    assert "[[ |" in lines[3] and lines[3].count("Ã|©") == 2
    assert sum(line.startswith("  text") for line in lines) == 4
    assert all(line.isprintable() for line in lines)
    assert any(line.startswith("training data: 2 samples of 4 documents, ") for line in lines)


def test_colours_on_a_terminal(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.configure()
    found = build_preview(load_config(Path("config.yaml"), overrides=[]).config, num_samples=1)
    _, _, text, tokens, *_ = command._lines(found, coloured=True)
    [run_of_text] = [piece for piece in found.samples[0].documents[0].runs if piece.supervised]
    assert "[[" not in text.plain
    assert [text.plain[span.start : span.end] for span in text.spans if span.style == "bold green"] == [
        run_of_text.text
    ]
    assert [tokens.plain[span.start : span.end] for span in tokens.spans if span.style] == ["|".join(run_of_text.text)]
    console = Console(force_terminal=True, width=20, color_system="standard")
    with console.capture() as capture:
        console.print(text, highlight=False, soft_wrap=True)
    assert capture.get().count("\n") == 1


def test_the_pieces_make_up_the_sample(workspace: Workspace) -> None:
    workspace.configure()
    config = load_config(Path("config.yaml"), overrides=[]).config
    found = build_preview(config, num_samples=50)
    assert sorted(sample.index for sample in found.samples) == list(range(20))
    for sample in found.samples:
        [document] = sample.documents
        assert len(document.tokens) == sample.num_tokens
        assert sum(token.supervised for token in document.tokens) == sample.num_supervised
        for learnt in (False, True):
            together = "".join(token.text for token in document.tokens if token.supervised == learnt)
            assert document.runs[learnt] == Piece(together, learnt)
    assert found.evaluation is not None
    assert (len(found.evaluation.lengths), found.num_steps, found.rows_at_once) == (9, 8, 6)


def test_what_is_wrong_is_told(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(workspace.root / "train.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    configure(workspace, {"format": {"type": "chat"}, "evaluation": None})
    assert run(["preview", "config.yaml"]) == 2
    assert "the tokenizer has no chat template; set data.chat_template" in capsys.readouterr().err
    assert run(["preview", "config.yaml", "--set", f"data.chat_template={json.dumps(INSTRUCTIONS)}"]) == 2
    assert "train.jsonl: no conversation has an assistant's turn to learn" in capsys.readouterr().err
    assert run(["preview", "config.yaml", "--set", "model.path=nowhere/at/all"]) == 2
    assert "model.path: nowhere/at/all: there is no such folder" in capsys.readouterr().err


def test_a_tokenizer_with_nothing_to_pad_with(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(workspace.root / "model")
    workspace.configure()
    assert run(["preview", "config.yaml"]) == 2
    assert "model.path: model: the tokenizer has no pad, eos or unk token to pad with" in capsys.readouterr().err
