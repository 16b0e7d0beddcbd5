"""Logits exist where something is predicted, and nowhere else: what the head gives in whole evaluations."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.chats import chat_tokenizer
from tests.data.test_tasks import HUB
from tests.tiny import VOCABULARY, sentiment_rows, tiny_llama, write_jsonl
from tests.workspace import Workspace
from vamo_ft.config.data import DataConfig
from vamo_ft.core.scores import exact_match
from vamo_ft.data.loading import load_samples
from vamo_ft.models.generation import greedy_decoder, text_decoder
from vamo_ft.objectives.causal_lm import CausalLM
from vamo_ft.objectives.classification import VerbaliserClassification
from vamo_ft.objectives.generation import AnsweringLM, AnswerScores
from vamo_ft.training.evaluation import evaluate
from vamo_ft.training.progress import SilentProgress
from vamo_ft.training.runtime import build_runtime

LONG = "word " * 30
CHATS = [
    {"messages": [{"role": "user", "content": LONG}, {"role": "assistant", "content": "yes" * (1 + index % 3)}]}
    for index in range(5)
]


@pytest.fixture
def shapes() -> Iterator[list[tuple[int, ...]]]:
    """The shapes that every head gave, as they come."""
    seen: list[tuple[int, ...]] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, nn.Linear) and isinstance(output, Tensor) and module.out_features >= VOCABULARY:
            seen.append(tuple(output.shape))

    handle = nn.modules.module.register_module_forward_hook(note)
    yield seen
    handle.remove()


def evaluated(rows: list[dict[str, Any]], format: dict[str, Any], workspace: Workspace, answers: int | None) -> None:
    write_jsonl(workspace.root / "rows.jsonl", rows)
    tokenizer, model = chat_tokenizer(), tiny_llama()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = DataConfig(train={"path": "rows.jsonl"}, evaluation={"path": "rows.jsonl"}, format=format, max_length=400)
    _, held_out = load_samples(
        config,
        tokenizer,
        task="causal_lm",
        batch_size=2,
        seed=0,
        position_ids=True,
        offline=True,
        answer_tokens=answers,
    )
    language_model = CausalLM(model, accepts_logits_to_keep=True)
    objective: Any = language_model
    if "accuracy" in config.format.metrics:
        objective = VerbaliserClassification(language_model)
    elif answers is not None:
        scores = AnswerScores(
            generate=greedy_decoder(model, tokenizer, max_new_tokens=answers),
            decode=text_decoder(tokenizer),
            scores={"exact_match": exact_match},
        )
        objective = AnsweringLM(language_model, scores)
    assert held_out is not None
    keys: dict[str, Any] = {"token_budget": 2000, "progress": SilentProgress(), "stop_requested": lambda: False}
    with torch.no_grad():
        evaluate(objective, held_out, build_runtime(autocast=None), **keys)


SENTENCES = [{**row, "sentence": LONG + row["sentence"]} for row in sentiment_rows(6)]


@pytest.mark.parametrize(
    ("rows", "format", "most"),
    [
        (
            SENTENCES,
            {"type": "classification", "template": "{sentence}", "labels": {"0": "b", "1": "c"}},
            1,
        ),
        (
            SENTENCES,
            {"type": "classification", "template": "{sentence}", "labels": {"0": " bad", "1": " fine"}},
            len(" fine"),
        ),
        ([HUB["record"]] * 3, {"type": "task", "name": "record"}, len(HUB["record"]["query"])),
        (CHATS, {"type": "chat"}, len("yesyesyes<|im_end|>")),
    ],
    ids=["one token", "words", "own options", "chat"],
)
def test_only_what_is_scored_has_logits(
    workspace: Workspace,
    shapes: list[tuple[int, ...]],
    rows: list[dict[str, Any]],
    format: dict[str, Any],
    most: int,
) -> None:
    evaluated(rows, format, workspace, None)
    assert shapes
    assert all(positions <= most for _, positions, _ in shapes)


@pytest.mark.parametrize(
    ("rows", "format"), [([HUB["squad"]] * 3, {"type": "task", "name": "squad"}), (CHATS, {"type": "chat"})]
)
def test_a_prompt_that_is_answered_has_the_logits_of_its_last_token(
    workspace: Workspace, shapes: list[tuple[int, ...]], rows: list[dict[str, Any]], format: dict[str, Any]
) -> None:
    evaluated(rows, format, workspace, 4)
    widths = [positions for _, positions, _ in shapes]
    learnt = max(widths)
    assert widths.count(1) >= 4, "the prompts, and every token but the last"
    assert set(widths) == {1, learnt}
    assert learnt < 20
