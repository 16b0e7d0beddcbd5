"""`vamo-ft generate`: what is printed, against plain transformers on the exported folder."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import save_model_folder, tiny_bert_classifier, tiny_llama, write_jsonl
from tests.workspace import ADAMW, LORA, PLAIN, Workspace, base_config, merged
from vamo_ft.cli import run
from vamo_ft.models.export import quietly

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<bot>' if add_generation_prompt }}"
CONTROL = {code: repr(chr(code))[1:-1] for code in range(160) if code not in (9, 10) and not chr(code).isprintable()}
HOT = ("--temperature", "3")  # what is drawn shows small differences of the probabilities
LEARNT: dict[str, Any] = {**PLAIN, **ADAMW, "training": {"steps": 30}}


def generate(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Standard output of a command that succeeds."""
    capsys.readouterr()
    assert run(["generate", *arguments]) == 0
    return capsys.readouterr().out


def greedy(model: Any, folder: str, prompt: str, *, count: int) -> str:
    """The continuation by a loop over plain forward passes, up to the end-of-text token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + count:
            best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if best == tokenizer.eos_token_id:
                break
            ids.append(best)
    return tokenizer.decode(ids[start:])


@pytest.fixture
def adapted(workspace: Workspace) -> Workspace:
    workspace.configure(merged(LEARNT, {"model": {"adapter": {**LORA, "target_modules": "all-linear"}}}))
    assert workspace.train() == 0
    return workspace


def test_a_run_says_what_it_learnt(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.configure(LEARNT)
    assert workspace.train() == 0
    assert generate(capsys, "runs/tiny", "very good It was", "--max-new-tokens", "5") == " fine\n"
    printed = generate(capsys, "runs/tiny", "very good It was", "very bad It was", "--max-new-tokens", "4")
    assert printed == "> very good It was\n fin\n> very bad It was\n bad\n"
    folder = "runs/tiny/checkpoints/step-00000030"
    assert generate(capsys, folder, "very good It was", "--max-new-tokens", "5") == " fine\n"
    assert generate(capsys, "runs/tiny/model", "very good It was", "--max-new-tokens", "5") == " fine\n"


def test_an_adapter_answers_on_its_base(adapted: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    with quietly():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), "runs/tiny/model").eval()
    expected = greedy(model, "model", "very good It was", count=12)
    base = greedy(AutoModelForCausalLM.from_pretrained("model"), "model", "very good It was", count=12)
    assert expected != base
    for target, text in (("runs/tiny", expected), ("runs/tiny/model", expected), ("model", base)):
        printed = generate(capsys, target, "very good It was", "--max-new-tokens", "12")
        assert printed == text.translate(CONTROL) + "\n"


def test_standard_input(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("very good\nIt was\n"))
    piped = generate(capsys, "model", "-", "--max-new-tokens", "6")
    assert piped == generate(capsys, "model", "very good\nIt was", "--max-new-tokens", "6")


def test_what_is_drawn_depends_on_the_seed_alone(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("model", "It was", "--max-new-tokens", "20", "--temperature", "1.5")
    state = torch.random.get_rng_state()
    first = generate(capsys, *arguments, "--seed", "1")
    torch.rand(3)
    assert generate(capsys, *arguments, "--seed", "1") == first
    assert generate(capsys, *arguments, "--seed", "2") != first
    torch.random.set_rng_state(state)
    greedy_text = generate(capsys, *arguments[:4])
    assert generate(capsys, *arguments, "--top-p", "0.000001") == greedy_text != first
    assert torch.equal(torch.random.get_rng_state(), state)


def test_chat_and_raw_prompts(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.chat_template = TEMPLATE
    save_model_folder(Path("chat"), tiny_llama())
    tokenizer.save_pretrained("chat")
    short = ("--max-new-tokens", "8")
    wrapped = generate(capsys, "model", "<user>It was<bot>", *short)
    assert generate(capsys, "chat", "It was", *short) == wrapped
    assert generate(capsys, "chat", "It was", "--raw", *short) == generate(capsys, "model", "It was", *short) != wrapped
    workspace.configure(merged(PLAIN, {"model": {"path": "chat"}, "training": {"steps": 1}}))
    assert workspace.train() == 0
    raw = generate(capsys, "runs/tiny", "It was", *short)
    assert raw == generate(capsys, "runs/tiny", "It was", "--raw", *short), "as the run was trained"
    assert raw != generate(capsys, "runs/tiny", "It was", "--chat", *short)


def test_control_characters_reach_no_terminal(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    tokenizer = AutoTokenizer.from_pretrained("model")
    escape = tokenizer("\x1b")["input_ids"][0]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[escape] = model.model.norm(torch.ones(32))
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    save_model_folder(Path("escape"), model)
    assert generate(capsys, "escape", "It was", "--max-new-tokens", "2") == "\\x1b\\x1b\n"


def test_the_end_tokens_of_the_model_are_ends(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(generate(capsys, "model", "It was", "--max-new-tokens", "9")) > 2
    ids = torch.tensor([AutoTokenizer.from_pretrained("model")("It was")["input_ids"]])
    first = int(tiny_llama()(input_ids=ids).logits[0, -1].argmax())
    path = Path("model/generation_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [2, first]}))
    assert len(generate(capsys, "model", "It was", "--max-new-tokens", "9")) == 2, "that token, and the line end"


def test_what_cannot_be_asked_is_refused(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    save_model_folder(Path("bert"), tiny_bert_classifier())
    workspace.configure(merged(PLAIN, {"model": {"path": "bert", "task": "sequence_classification"}}))
    assert workspace.train("--set", "training.steps=1") == 0
    Path("broken").mkdir()
    Path("broken/adapter_config.json").write_text("{}")
    Path("begun").mkdir()
    Path("begun/config.yaml").write_text(Path("config.yaml").read_text())
    capsys.readouterr()
    for arguments, message in (
        (("model", "It was", "--top-p", "0.9"), "--top-p: nothing is drawn; add --temperature"),
        (("model", "It was", "--top-p", "0", "--temperature", "1"), "--top-p: 0 leaves no token to draw"),
        (("model", "It was", "--temperature", "inf"), "must be a finite number"),
        (("model", "It was", "--chat"), "the tokenizer has no chat template; --raw gives the prompt as it is"),
        (
            ("model", "It was", "--max-new-tokens", "600"),
            "the prompt has 6 tokens, and the model positions for 512; shorten the prompt, or",
        ),
        (("model", "It was", "--set", "run.seed=1"), "--set: model is not a run"),
        (("runs/tiny", "It was"), "the run trained a classifier"),
        (("broken", "It was"), "does not name the base model"),
        (("begun", "It was"), "no final model yet"),
        (("a/b/c", "It was"), "there is no such folder, and it is not a Hub id"),
    ):
        assert run(["generate", *arguments]) == 2, arguments
        assert message in capsys.readouterr().err


def test_a_run_on_conversations_is_asked_as_it_was_trained(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1+1"}]
    write_jsonl(Path("train.jsonl"), [{"messages": [*turns, {"role": "assistant", "content": "= 2"}]}] * 4)
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    data = {
        "train": {"path": "train.jsonl"},
        "format": {"type": "chat", "system": "Be short."},
        "chat_template": template,
    }
    config = {**merged(base_config(), {**LEARNT, "training": {"steps": 40}}), "data": data}
    Path("config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert workspace.train() == 0
    wrapped = "<system>Be short.</s><user>{}</s><assistant>"
    assert generate(capsys, "runs/tiny", "1+1", "--max-new-tokens", "9") == "= 2\n"
    for question in ("1+1", "What?"):
        asked = generate(capsys, "runs/tiny", question, "--max-new-tokens", "9", *HOT)
        assert asked == generate(capsys, "runs/tiny", wrapped.format(question), "--raw", "--max-new-tokens", "9", *HOT)
