"""Model folders that load with transformers or peft and nothing of ours."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

__all__ = ["quietly", "save_model", "saved_bytes", "write_model_card"]


def save_model(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Writes the adapter, or the whole model, and the tokenizer; no network, no pickle.

    Loads with `from_pretrained` of transformers, or of `PeftModel` on the base model.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with quietly():
        if isinstance(model, PeftModel):
            # Embeddings keep their size, so peft need not look the base model up to decide whether to save them.
            model.save_pretrained(directory, save_embedding_layers=False)
            (directory / "README.md").unlink(missing_ok=True)  # peft's empty template
        else:
            config = model.config.get_text_config()
            config.use_cache = True  # off in training only
            try:
                model.save_pretrained(directory)
            finally:
                config.use_cache = False
        tokenizer.save_pretrained(directory)
    for weights in directory.glob("*.safetensors"):  # these are made readable by the owner alone
        weights.chmod((directory / "tokenizer_config.json").stat().st_mode)


def saved_bytes(model: PreTrainedModel | PeftModel) -> int:
    """Bytes of the tensors that `save_model` writes; tied ones count once."""
    if isinstance(model, PeftModel):
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        tensors = model.state_dict()
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors.values()}.values())


def write_model_card(directory: Path, *, title: str, facts: Mapping[str, str]) -> None:
    """Writes `README.md`: how to load what `save_model` wrote, and a table of `facts`."""
    if (directory / "adapter_config.json").exists():
        use = "An adapter: load the base model with transformers, then `PeftModel.from_pretrained(model, folder)`."
    else:
        use = "Loads with `from_pretrained` of transformers."
    rows = "".join(f"| {_cell(name)} | {_cell(value)} |\n" for name, value in facts.items())
    card = f"---\ntags:\n- vamo-ft\n---\n\n# {title}\n\nFine-tuned with vamo-ft. {use}\n\n| | |\n|---|---|\n{rows}"
    (directory / "README.md").write_text(card, encoding="utf-8")


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


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
