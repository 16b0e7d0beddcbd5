"""Loads a model and its tokenizer, ready to train: from the Hub, a folder, a `.gguf` file or a checkpoint."""

import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from os.path import exists, expanduser, isdir, isfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vamo_ft.config.model import ModelConfig
from vamo_ft.core.allocations import CopiedOutlines, outlines
from vamo_ft.core.errors import DataError, VamoFtError
from vamo_ft.core.parameters import num_weights
from vamo_ft.core.streaming import LayerStream
from vamo_ft.models.adapters import add_adapter, freeze, load_adapter
from vamo_ft.models.causality import check_causal
from vamo_ft.models.export import quietly
from vamo_ft.models.folder import check_model_folder, check_tokenizer, first_words
from vamo_ft.models.four_bits import FourBits, cast_others, check_four_bits, decode, four_bits, kept_whole, on_device
from vamo_ft.models.heads import belongs_to_head, name_classes, set_num_labels
from vamo_ft.models.stored_quantization import load_as, stored_four_bits, stored_quantization

__all__ = ["LoadedModel", "checkpoint_activations", "load_model", "load_outline", "load_tokenizer"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TASKS = {"causal_lm": AutoModelForCausalLM, "sequence_classification": AutoModelForSequenceClassification}


@dataclass(frozen=True)
class LoadedModel:
    """A model on the CPU, its tokenizer, and what the model's forward pass understands.

    Attributes:
        stream: what holds the model's layers on the host; None: nothing does, and the model is on one device.
        tokenizer: always has a pad token, one that the embedding has a row for.
        accepts_position_ids: whether positions can be given, as left padding needs.
        accepts_logits_to_keep: whether logits can be limited to some positions.
        four_bits: how matrices are held in 4 bits, or were stored so before they were decoded; None: they are not.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    accepts_position_ids: bool
    accepts_logits_to_keep: bool
    stream: LayerStream | None = None
    four_bits: FourBits | None = None

    @property
    def root(self) -> nn.Module:
        """The module that every use of the model calls: with an adapter, the base model that it was added to."""
        root: nn.Module = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return root

    @property
    def numel(self) -> int:
        """Elements of all parameters, frozen ones and tied ones (once) included."""
        return sum(map(num_weights, self.model.parameters()))

    @property
    def max_positions(self) -> int | None:
        """The longest row, in tokens, that the model has positions for; None: it does not say."""
        limit: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit


def load_model(
    config: ModelConfig,
    *,
    offline: bool,
    seed: int,
    num_labels: int | None = None,
    class_names: Sequence[str] = (),
    weights: Path | None = None,
    decoded: bool = False,
) -> LoadedModel:
    """The model of `config`, with its adapter and frozen parameters, and its tokenizer.

    The global random state is neither used nor changed.

    Args:
        offline: make no network call.
        seed: of what is not loaded: a new adapter, a new classifier head.
        num_labels: classes of a sequence_classification model.
        class_names: what its config.json is to call them where it has no names for them yet.
        weights: `model/` of a checkpoint or of a finished run, whose values are taken over bit for bit. With an adapter
            it holds the adapter, and the rest comes from `config.path`; without one it holds the whole model.
        decoded: of weights that are stored in 4 bits take the values that they stand for, in `dtype`.

    Raises:
        DataError: the model cannot be loaded or there is nothing to train, with the place and the fix.
    """
    assert (num_labels is not None) == (config.task == "sequence_classification")
    saved = None if weights is None else _local(weights, config=config)
    complete = weights is not None and config.adapter is None
    if weights is not None and complete:
        check_model_folder(weights)
    source = saved if saved is not None and complete else _locate(config, offline=offline)
    with quietly(), _one_line_errors(config.path), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the CUDA devices
        tokenizer = _load_tokenizer(saved or source)
        for name in ("local_files_only", "is_local"):  # true here, and of no meaning where it is saved
            tokenizer.init_kwargs.pop(name, None)
        model, new_modules, held = _load(source, config=config, num_labels=num_labels, complete=complete)
        if decoded and held is not None:
            decode(model)
        _choose_pad_token(tokenizer, model, path=config.path)
        name_classes(model.config, class_names)
        accepted = _accepted(model)
        if config.adapter is not None and weights is not None:
            model = load_adapter(model, weights, base=config.path)
        elif config.adapter is not None:
            model = add_adapter(model, config, modules_to_save=new_modules)
    freeze(model, config.freeze)
    return LoadedModel(model, tokenizer, *accepted, four_bits=held)


def load_outline(
    config: ModelConfig, *, offline: bool, num_labels: int | None = None, modules_to_save: Sequence[str] = ()
) -> LoadedModel:
    """The model of `config` as outlines, tensors without values, and its tokenizer; no weights are read.

    A folder needs config.json and the tokenizer alone. Of a `.gguf` file the header is read. Quantised weights are
    outlined in `dtype`.

    Args:
        modules_to_save: layers that the adapter trains in full, besides those that the configuration names.

    Raises:
        DataError: the configuration or the tokenizer cannot be loaded, or there is nothing to train.
    """
    source = _locate_outline(config, offline=offline)
    tokenizer = load_tokenizer(config, offline=offline)
    outlined = outlines()
    with quietly(), _one_line_errors(config.path), torch.random.fork_rng(devices=[]):
        model_config = _load_config(source, config=config, num_labels=num_labels)
        held = _four_bits(config, source, model_config)
        with outlined:
            model = _TASKS[config.task].from_config(
                model_config,
                dtype=_DTYPES[config.dtype],
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
            )
        model.config.get_text_config().use_cache = False
        model.get_input_embeddings().padding_idx = None
        _choose_pad_token(tokenizer, model, path=config.path)
        accepted = _accepted(model)
        if config.adapter is not None:
            # Not as an outline: peft moves what it makes, which outlines do not.
            with CopiedOutlines():
                model = add_adapter(model, config, modules_to_save=modules_to_save)
            for module in model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    outline = nn.Parameter(outlined.from_tensor(parameter), requires_grad=parameter.requires_grad)
                    setattr(module, name, parameter if isinstance(parameter, FakeTensor) else outline)
    freeze(model, config.freeze)
    return LoadedModel(model, tokenizer, *accepted, four_bits=held)


def load_tokenizer(config: ModelConfig, *, offline: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of `config` alone; the model's weights need not be there. It always has a pad token.

    Raises:
        DataError: the tokenizer cannot be loaded, with the place and the fix.
    """
    source = _locate_outline(config, offline=offline)
    with quietly(), _one_line_errors(config.path):
        tokenizer = _load_tokenizer(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise _nothing_to_pad_with(config.path)
    return tokenizer


def checkpoint_activations(model: PreTrainedModel | PeftModel) -> None:
    """Lets every layer keep its input alone in training, and compute the rest again in the backward pass.

    transformers also lets the embedding's output require a gradient, which reentrant checkpoints need; here it would
    make the backward pass go through frozen layers for nothing, and is turned off.
    """
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()


def _accepted(model: PreTrainedModel) -> tuple[bool, bool]:
    """Whether its forward pass takes `position_ids`, and `logits_to_keep`."""
    parameters = inspect.signature(model.forward).parameters
    return "position_ids" in parameters, "logits_to_keep" in parameters


def _locate(config: ModelConfig, *, offline: bool) -> dict[str, Any]:
    """Arguments of `from_pretrained` for `model.path`."""
    path = Path(expanduser(config.path))
    if path.suffix == ".gguf":
        if not isfile(path):
            raise DataError(f"model.path: {config.path}: there is no such file")
        if importlib.util.find_spec("gguf") is None:
            raise DataError(
                f"model.path: {config.path}: reading .gguf files needs another package: pip install 'vamo-ft[gguf]'"
            )
        return _local(path.parent, config=config) | {"gguf_file": path.name}
    if isdir(path):  # unlike Path.is_dir, false for a name that is too long; so is isfile
        if config.revision is not None:
            raise DataError(f"model.revision: {config.path} is a local folder, which has none; leave it out")
        check_model_folder(path)
        return _local(path, config=config)
    if isfile(path):
        raise DataError(f"model.path: {config.path}: is a file; write the model's folder, or a .gguf file")
    try:
        cached = try_to_load_from_cache(config.path, "config.json", revision=config.revision)
    except HFValidationError:
        raise DataError(f"model.path: {config.path}: there is no such folder, and it is not a Hub id") from None
    if offline and not isinstance(cached, str):
        raise DataError(
            f"model.path: {config.path}: is not in the Hugging Face cache, and run.offline is true; "
            "download it once with run.offline: false"
        )
    return {
        "pretrained_model_name_or_path": config.path,
        "revision": config.revision or "main",
        "local_files_only": offline,
        "trust_remote_code": config.trust_remote_code,
    }


def _locate_outline(config: ModelConfig, *, offline: bool) -> dict[str, Any]:
    """The same for what needs no weights, which a folder then need not have."""
    folder = Path(expanduser(config.path))
    return _local(folder, config=config) if isdir(folder) else _locate(config, offline=offline)


def _local(directory: Path, *, config: ModelConfig) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(directory),
        "local_files_only": True,
        "trust_remote_code": config.trust_remote_code,
    }


def _load(
    source: dict[str, Any], *, config: ModelConfig, num_labels: int | None, complete: bool
) -> tuple[PreTrainedModel, list[str], FourBits | None]:
    """The model, the modules that the weights do not hold (of a new classifier head), and how it is held in 4 bits."""
    model_config = _load_config(source, config=config, num_labels=num_labels)
    if getattr(model_config, "transformers_weights", None) is not None:
        raise DataError(f"model.path: {config.path}: config.json names its own weights file, which is not supported")
    held = _four_bits(config, source, model_config)
    model, info = _TASKS[config.task].from_pretrained(
        **source,
        config=model_config,
        dtype=_DTYPES[config.dtype],
        attn_implementation=config.attn_implementation,
        use_safetensors=None if "gguf_file" in source else True,
        **_quantized(held, source, model_config),
        adapter_kwargs={"local_files_only": source["local_files_only"]},  # it looks for adapters too, by other means
        ignore_mismatched_sizes=True,  # reported below in one line
        output_loading_info=True,
    )
    if info["mismatched_keys"]:
        name, found, expected = min(info["mismatched_keys"])
        raise DataError(
            f"model.path: {config.path}: {name} has shape {tuple(found)} in the weights and {tuple(expected)} in the "
            "model"
        )
    missing = sorted(info["missing_keys"])
    head_may_be_new = num_labels is not None and not complete
    if strange := [name for name in missing if not (head_may_be_new and belongs_to_head(name, model))]:
        raise DataError(f"model.path: {config.path}: the weights lack {len(strange)} tensors, such as {strange[0]}")
    if held is not None:
        check_four_bits(model, path=config.path)
        if held.stored:
            cast_others(model, _DTYPES[config.dtype])
    model.config.get_text_config().use_cache = False
    # transformers gives the pad token's row no gradient. Which row that is must not depend on where the model comes
    # from, and where pad is the end-of-text token its row has to learn.
    model.get_input_embeddings().padding_idx = None
    return model, sorted({name.rpartition(".")[0] for name in missing}), held


def _load_config(source: dict[str, Any], *, config: ModelConfig, num_labels: int | None) -> PreTrainedConfig:
    model_config = AutoConfig.from_pretrained(**source)
    if num_labels is not None:
        set_num_labels(model_config, num_labels, path=config.path)
    else:
        check_causal(model_config, path=config.path)
    return model_config


def _four_bits(config: ModelConfig, source: dict[str, Any], model_config: PreTrainedConfig) -> FourBits | None:
    stored = None if "gguf_file" in source else stored_quantization(model_config, config)
    if stored is None and config.quantization is None:
        return None
    with torch.device("meta"):
        outline = _TASKS[config.task].from_config(deepcopy(model_config), trust_remote_code=config.trust_remote_code)
    if stored is not None:
        return stored_four_bits(outline, stored, model_config, config)
    assert config.quantization is not None
    assert config.adapter is not None, "checked with the configuration"
    kept = kept_whole(outline, in_full=config.adapter.modules_to_save)
    return FourBits.of(outline, config.quantization, kept=kept, decoded=_DTYPES[config.dtype])


def _quantized(held: FourBits | None, source: dict[str, Any], model_config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` for weights that are, or are to be, quantised."""
    if "gguf_file" in source:
        return {"quantization_config": GgufConfig(dequantize=True)}
    if held is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        where = f"model.path: {source['pretrained_model_name_or_path']}" if held.stored else "model.quantization"
        raise DataError(f"{where}: needs another package: pip install 'vamo-ft[bitsandbytes]'")
    if not held.stored:
        return four_bits(held.config, kept=held.kept)
    load_as(model_config, held)
    return on_device()


def _load_tokenizer(source: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(**source)
    except Exception as error:
        directory = source["pretrained_model_name_or_path"]
        if "gguf_file" not in source and isdir(directory) and not _needs_own_code(error):
            check_tokenizer(Path(directory))
        raise


def _needs_own_code(error: Exception) -> bool:
    """Whether transformers refused code that comes with the model; it has no exception of its own for that."""
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


def _choose_pad_token(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, *, path: str) -> None:
    """Uses a token that exists, so that the embedding keeps its size; its value never matters."""
    rows = model.get_input_embeddings().weight.shape[0]
    for token in (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token):
        index = None if token is None else tokenizer.convert_tokens_to_ids(token)
        if index is not None and index < rows:
            tokenizer.pad_token = token
            model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
            return
    raise _nothing_to_pad_with(path)


def _nothing_to_pad_with(path: str) -> DataError:
    return DataError(f"model.path: {path}: the tokenizer has no pad, eos or unk token to pad with")


@contextmanager
def _one_line_errors(path: str) -> Iterator[None]:
    """Turns whatever the libraries raise for a bad model into one line of it, with the place."""
    try:
        yield
    except (VamoFtError, MemoryError, RuntimeError):  # an allocation that failed is explained elsewhere
        raise
    except Exception as error:
        reason = first_words(error)
        if isinstance(error, OSError) and not exists(expanduser(path)):
            reason = f"there is no such folder, and the Hub does not give it: {reason}"
        if _needs_own_code(error):
            reason = (
                "comes with Python code of its own, which is not run; read it, and set model.trust_remote_code: true "
                "to run it"
            )
        raise DataError(f"model.path: {path}: {reason}") from error
