"""The model and the data that all cases share.

Shapes: every sample has `length` tokens, the last `labelled` of which are supervised.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from scripts.benchmarks.results import NotAvailable
from vamo_ft.core.blocks import model_blocks
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.types import Batch
from vamo_ft.data.collation import collate_for_language_model
from vamo_ft.data.examples import Example
from vamo_ft.models.export import quietly

__all__ = ["RandomSamples", "Setting", "choose_device"]

_QUICKSTART = Path(__file__).resolve().parents[2] / "data" / "quickstart" / "model"
_SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
}
_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}


def choose_device(kind: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of that kind; auto: the first CUDA device, else the CPU.

    Raises:
        NotAvailable: there is no CUDA device.
    """
    available = torch.cuda.is_available()
    if kind == "cuda" and not available:
        raise NotAvailable("not available: torch sees no CUDA device")
    return torch.device("cpu") if kind == "cpu" or not available else torch.device("cuda", 0)


@dataclass(frozen=True)
class Setting:
    """What is measured, and how often.

    Attributes:
        model: auto, tiny or a model's folder.
        batch: rows of a batch.
        length: tokens of a row.
        labelled: supervised tokens at the end of a row.
        repeats: rounds that count.
        warmup: rounds before them.
        precisions: of the weights, for the cases that measure several.
    """

    model: str
    batch: int
    length: int
    labelled: int
    repeats: int
    warmup: int
    device: torch.device
    precisions: tuple[str, ...] = ("float32", "bfloat16")

    @cached_property
    def folder(self) -> Path | None:
        """Where the model is; None for one with random weights."""
        if self.model == "tiny":
            return None
        if self.model == "auto":
            return _QUICKSTART if (_QUICKSTART / "config.json").is_file() else None
        return Path(self.model)

    @property
    def model_name(self) -> str:
        """For the heading."""
        if self.folder is not None:
            return self.folder.resolve().name
        return "random, tiny" if self.model == "tiny" else "random, of SmolLM2-135M's shape"

    @cached_property
    def config(self) -> Any:
        """The model's configuration, of transformers."""
        if self.folder is not None:
            return AutoConfig.from_pretrained(str(self.folder), local_files_only=True)
        shape = _TINY if self.model == "tiny" else _SMOLLM2
        return LlamaConfig(**shape, max_position_embeddings=2048, tie_word_embeddings=True)

    @cached_property
    def num_parameters(self) -> int:
        """Elements of the model, tied ones once."""
        return TrainableParameters(self._shape).numel

    @cached_property
    def num_blocks(self) -> int:
        """Blocks of a block-coordinate method."""
        return len(model_blocks(self._shape, TrainableParameters(self._shape)))

    @cached_property
    def _shape(self) -> nn.Module:
        """The model without values; nothing is loaded."""
        with torch.device("meta"):
            module: nn.Module = AutoModelForCausalLM.from_config(self.config)
        return module

    def build_model(self, dtype: torch.dtype) -> nn.Module:
        """A model of its own, in memory of its own (not in the file's), on the device, as vamo-ft would load it."""
        if self.folder is not None:
            with quietly():
                model = AutoModelForCausalLM.from_pretrained(str(self.folder), dtype=dtype, local_files_only=True)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = LlamaForCausalLM(self.config).to(dtype)
        model.config.use_cache = False
        model.get_input_embeddings().padding_idx = None
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = parameter.data.to(self.device, copy=True)
        module: nn.Module = model.to(self.device).eval()
        return module

    def samples(self, count: int) -> "RandomSamples":
        """`count` samples of random tokens, the same at every call."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(3, self.config.vocab_size, (count, self.length), generator=generator).tolist()
        cut = self.length - self.labelled
        return RandomSamples(
            [Example(index, tuple(row), ((cut, self.length),)) for index, row in enumerate(tokens)],
            batch_size=self.batch,
        )

    def one_batch(self) -> Batch:
        """The first batch of the samples, on the device."""
        return self.samples(self.batch).batch(range(self.batch)).to(self.device)


class RandomSamples:
    """Samples of one length in the order of their numbers; a `core.protocols.SampleSource`."""

    def __init__(self, examples: Sequence[Example], *, batch_size: int) -> None:
        self.examples = examples
        self._batch_size = batch_size

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return len(self.examples)

    @property
    def batch_size(self) -> int:
        """Samples of one training step."""
        return self._batch_size

    @property
    def samples_per_epoch(self) -> int:
        """All of them."""
        return self.num_samples

    def frequency(self, index: int) -> float:
        """Each as often as any other."""
        return 1.0

    @property
    def fingerprint(self) -> str:
        """Nothing is ever resumed."""
        return "random"

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples at `indices`, collated as vamo-ft does."""
        chosen = [self.examples[index] for index in indices]
        return collate_for_language_model(chosen, pad_token_id=0, position_ids=True)

    def length(self, index: int) -> int:
        """Tokens that the model reads: the last one is only predicted."""
        example = self.examples[index]
        return len(example.token_ids) - 1

    def groups(self, indices: Sequence[int], *, token_budget: int) -> list[tuple[int, ...]]:
        """Cut so that samples times length stays within `token_budget`."""
        example = self.examples[0]
        size = max(1, token_budget // len(example.token_ids))
        return [tuple(indices[first : first + size]) for first in range(0, len(indices), size)]

    def step_indices(self, step: int) -> tuple[int, ...]:
        """One batch after the other, from the start again at the end."""
        first = step * self.batch_size
        return tuple(index % self.num_samples for index in range(first, first + self.batch_size))
