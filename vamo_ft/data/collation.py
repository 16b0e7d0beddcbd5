"""Builds batches on the host.

Shapes: B samples, O options, T input columns, K supervised columns, P prompt columns.

For a language model rows are padded on the left, so that completions of all rows coincide at the right end, and logits
are needed only in the K columns whose next token is supervised in some row.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vamo_ft.core.types import Batch
from vamo_ft.data.examples import Example, Ids, Spans

__all__ = [
    "IGNORED",
    "collate_for_classifier",
    "collate_for_generation",
    "collate_for_language_model",
    "collate_options",
    "collate_packed",
]

IGNORED = -100
"""In place of a token: nothing is supervised here."""


def collate_for_language_model(examples: Sequence[Example], *, pad_token_id: int, position_ids: bool) -> Batch:
    """Rows of tokens, of which some are supervised.

    The last token of a sample is predicted and not read, so inputs are one shorter than samples. Targets: `positions`
    (K,), the input columns whose next token is supervised in some row, and `tokens` (B, K), those next tokens or -100.

    Args:
        position_ids: also give positions that start at the first real token of each row.
    """
    rows = [(example.token_ids, example.supervised) for example in examples]
    inputs, targets = _left_padded(rows, pad_token_id=pad_token_id, position_ids=position_ids)
    counts = [example.num_supervised for example in examples]
    return _batch(examples, inputs=inputs, targets=targets, counts=counts, num_tokens=_inputs_of(rows))


def collate_packed(examples: Sequence[Example], *, pad_token_id: int) -> Batch:
    """Rows of several documents each, which are told apart by positions that start anew.

    There is no attention mask: given none, transformers takes every fall of the positions for the start of another
    sequence, and lets no token see beyond its own. The padding in front of a row is one more sequence, whose output
    nobody reads. Models that do not keep to this are found by `vamo_ft.models.packing`.
    """
    batch = collate_for_language_model(examples, pad_token_id=pad_token_id, position_ids=False)
    ids = batch.inputs["input_ids"]  # (B, T)
    positions = torch.empty_like(ids)
    for row, example in enumerate(examples):
        read = len(example.token_ids) - 1
        ends = [ids.shape[1] - read + end for end in example.documents[:-1]]
        starts = [0, ids.shape[1] - read, *ends]
        for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
            positions[row, start:end] = torch.arange(end - start)
    return replace(batch, inputs={"input_ids": ids, "position_ids": positions})


def collate_for_generation(examples: Sequence[Example], *, pad_token_id: int, position_ids: bool) -> Batch:
    """Prompts with their completions, as for a language model, and the prompts alone, to generate answers.

    Further targets: `prompt_ids` and `prompt_mask`, (B, P), padded on the left so that every row goes on at its end,
    and `answer_ids`, the completions, padded with -100. Of several supervised runs the last one is the completion.
    """
    batch = collate_for_language_model(examples, pad_token_id=pad_token_id, position_ids=position_ids)
    ids, mask = _right_aligned([example.prompt_ids for example in examples], padding=pad_token_id)
    answers, _ = _right_aligned([example.completion_ids for example in examples], padding=IGNORED)
    return replace(batch, targets={**batch.targets, "prompt_ids": ids, "prompt_mask": mask, "answer_ids": answers})


def collate_options(
    examples: Sequence[Example], *, options: Sequence[Ids], pad_token_id: int, position_ids: bool
) -> Batch:
    """Prompts and all label texts, to score one against another.

    Options of one token each share a single row per sample: targets `positions` (1,), `tokens` (B, 1) of the true
    option, `option_tokens` (O,) and `label` (B,). Otherwise row `b * O + o` is prompt b with option o: targets
    `positions` (K,), `tokens` (B * O, K) and `label` (B,). `counts` belongs to the true options in both cases.
    """
    labels = _labels(examples)
    if all(len(option) == 1 for option in options):
        rows = [(example.token_ids, example.supervised) for example in examples]
        extra = {"option_tokens": torch.tensor([option[0] for option in options])}  # (O,)
    else:
        rows = [_followed(example.prompt_ids, option) for example in examples for option in options]
        extra = {}
    inputs, targets = _left_padded(rows, pad_token_id=pad_token_id, position_ids=position_ids)
    counts = [len(example.completion_ids) for example in examples]
    targets |= extra | {"label": labels}
    return _batch(examples, inputs=inputs, targets=targets, counts=counts, num_tokens=_inputs_of(rows))


def collate_for_classifier(examples: Sequence[Example], *, pad_token_id: int, token_type_ids: bool) -> Batch:
    """Texts for a classifier head, padded on the right; the target is `label` (B,)."""
    width = max(len(example.prompt_ids) for example in examples)
    ids = torch.full((len(examples), width), pad_token_id)  # (B, T)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example.prompt_ids)] = torch.tensor(example.prompt_ids)
        mask[row, : len(example.prompt_ids)] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if token_type_ids:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return _batch(
        examples,
        inputs=inputs,
        targets={"label": _labels(examples)},
        counts=[1] * len(examples),
        num_tokens=sum(len(example.prompt_ids) for example in examples),
    )


def _followed(prompt: Ids, option: Ids) -> tuple[Ids, Spans]:
    return (*prompt, *option), ((len(prompt), len(prompt) + len(option)),)


def _left_padded(
    rows: Sequence[tuple[Ids, Spans]], *, pad_token_id: int, position_ids: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and targets of rows of tokens with supervised runs, the last of which ends its row."""
    ids, mask = _right_aligned([tokens[:-1] for tokens, _ in rows], padding=pad_token_id)
    inputs = {"input_ids": ids, "attention_mask": mask}  # (B, T)
    if position_ids:
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_(min=0)
    following = torch.full_like(ids, IGNORED)  # (B, T), the next token where it is supervised
    for row, (tokens, spans) in enumerate(rows):
        shift = ids.shape[1] - len(tokens)  # from a token's place in its row to the column that predicts it
        for start, end in spans:
            following[row, shift + start : shift + end] = torch.tensor(tokens[start:end])
    positions = (following != IGNORED).any(dim=0).nonzero().squeeze(1)  # (K,)
    return inputs, {"positions": positions, "tokens": following.index_select(1, positions)}


def _right_aligned(rows: Sequence[Ids], *, padding: int) -> tuple[Tensor, Tensor]:
    """Tokens, and a mask that is 0 on the padding in front of them."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), padding)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    return ids, mask


def _labels(examples: Sequence[Example]) -> Tensor:
    labels = [example.label for example in examples]
    assert None not in labels, "only a classification has labels"
    return torch.tensor(labels)  # (B,)


def _inputs_of(rows: Sequence[tuple[Ids, Spans]]) -> int:
    return sum(len(tokens) - 1 for tokens, _ in rows)


def _batch(
    examples: Sequence[Example],
    *,
    inputs: dict[str, Tensor],
    targets: dict[str, Tensor],
    counts: Sequence[int],
    num_tokens: int,
) -> Batch:
    return Batch(
        indices=tuple(example.index for example in examples),
        inputs=inputs,
        targets=targets,
        counts=torch.tensor(counts, dtype=torch.float32),
        num_tokens=num_tokens,
        num_supervised=int((targets["tokens"] != IGNORED).sum()) if "tokens" in targets else len(examples),
    )
