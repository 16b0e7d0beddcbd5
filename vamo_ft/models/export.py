"""Model folders that load with transformers or peft and nothing of ours."""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from vamo_ft.core.errors import UsageError
from vamo_ft.core.sharding import whole_tensor

__all__ = ["Dtype", "gathered", "quietly", "save_model", "saved_bytes", "saved_sizes", "shard_bytes"]

Dtype = Literal["float32", "bfloat16", "float16"]
"""Precisions that weights can be written in."""

_MAX_SHARD_SIZE = "5GB"


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    max_shard_size: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the adapter, or the whole model, and the tokenizer with its chat template; no network, no pickle.

    Loads with `from_pretrained` of transformers, or of `PeftModel` on the base model.

    Args:
        max_shard_size: largest file of a whole model's weights, as `shard_bytes` reads it, unless one tensor is larger;
            None: 5GB.
        weights: the model's state where processes share it out, see `gathered`; None: its own.

    Raises:
        UsageError: the size is none.
    """
    size = shard_bytes(max_shard_size or _MAX_SHARD_SIZE)
    directory.mkdir(parents=True, exist_ok=True)
    with quietly():
        if isinstance(model, PeftModel):
            # Embeddings keep their size, so peft need not look the base model up to decide whether to save them.
            model.save_pretrained(directory, save_embedding_layers=False, state_dict=weights)
            (directory / "README.md").unlink(missing_ok=True)  # peft's empty template
        else:
            config = model.config.get_text_config()
            config.use_cache = True  # off in training only
            try:
                model.save_pretrained(directory, max_shard_size=size, state_dict=weights)
            finally:
                config.use_cache = False
        tokenizer.save_pretrained(directory)
    for file in directory.glob("*.safetensors"):  # these are made readable by the owner alone
        file.chmod((directory / "tokenizer_config.json").stat().st_mode)


def saved_bytes(model: PreTrainedModel | PeftModel) -> int:
    """Bytes of the tensors that `save_model` writes; tied ones count once."""
    return sum(saved_sizes(model))


def saved_sizes(model: PreTrainedModel | PeftModel) -> list[int]:
    """The same for each of them."""
    return [*{id(each): each.nbytes for each in _saved(model).values()}.values()]


def gathered(model: PreTrainedModel | PeftModel, *, keep: bool) -> dict[str, Tensor] | None:
    """The state that `save_model` writes of a model that processes share out, on the host; collective.

    Tensors are put together one after the other, so that the device holds one of them at a time.

    Args:
        keep: whether this process takes it; the others only give their parts, and get None.
    """
    state, whole = {}, dict[int, Tensor]()
    saved = {id(tensor) for tensor in _saved(model).values()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in saved and id(tensor) not in whole:
            put_together = whole_tensor(tensor.detach())
            whole[id(tensor)] = put_together.cpu() if keep else tensor
        if id(tensor) in saved:
            state[name] = whole[id(tensor)]
    return state if keep else None


def _saved(model: PreTrainedModel | PeftModel) -> dict[str, Tensor]:
    """The model's own tensors that are written, by name; tied ones are one object."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    if isinstance(model, PeftModel):
        state = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    return state


def shard_bytes(size: str) -> int:
    """Bytes of a size such as `5GB` or `500MB`, decimal as everywhere on the Hub.

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"(\d+)(KB|MB|GB|TB)", size.strip().upper())
    if match is None or int(match[1]) == 0:
        raise UsageError(f"--max-shard-size: must be a whole number of KB, MB, GB or TB, such as 5GB, not {size!r}")
    units: dict[str, int] = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    return int(match[1]) * units[match[2]]


@contextmanager
def quietly() -> Iterator[None]:
    """Keeps transformers and peft from writing to the terminal; what matters is raised."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what one library deprecates and another still uses
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
