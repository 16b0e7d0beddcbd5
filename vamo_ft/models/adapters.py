"""What of a model is trained: LoRA adapters through peft, and frozen parameters."""

import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vamo_ft.config.model import ModelConfig
from vamo_ft.core.errors import DataError
from vamo_ft.models.folder import check_adapter_folder

__all__ = ["add_adapter", "freeze", "load_adapter", "trained_in_full"]

_ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding)
_PREFIX = "base_model.model."


def add_adapter(model: PreTrainedModel, config: ModelConfig, *, modules_to_save: Sequence[str] = ()) -> PeftModel:
    """`model` inside a new LoRA adapter; only the adapter requires gradients.

    The matrices A are drawn from the CPU's global generator, the matrices B are zero. They are float32; layers that are
    trained in full keep the model's precision.

    Args:
        modules_to_save: layers to train and save in full besides those of the configuration and the classifier head.

    Raises:
        DataError: a name in `target_modules` or `modules_to_save` matches no layer.
    """
    adapter = config.adapter
    assert adapter is not None
    layers = [name for name, module in model.named_modules() if isinstance(module, _ADAPTABLE)]
    if adapter.target_modules != "all-linear":
        _check_names(adapter.target_modules, layers, key="target_modules", shown=layers)
    _check_names(
        adapter.modules_to_save, [name for name, _ in model.named_modules()], key="modules_to_save", shown=layers
    )
    # peft adds these itself, and what is trained in full a second time within them would not be used.
    heads = {"classifier", "score"} if config.task == "sequence_classification" else set()
    in_full = sorted(name for name in {*adapter.modules_to_save, *modules_to_save} if heads.isdisjoint(name.split(".")))
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS if config.task == "sequence_classification" else TaskType.CAUSAL_LM,
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        modules_to_save=in_full or None,
        use_rslora=adapter.use_rslora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        revision=config.revision,
    )
    adapted: PeftModel = get_peft_model(model, lora)
    adapted.peft_config["default"].base_model_name_or_path = config.path
    return adapted


def load_adapter(model: PreTrainedModel, directory: Path, *, base: str) -> PeftModel:
    """`model` inside the adapter saved in `directory`, ready to train on.

    Args:
        base: what the adapter names as its base model when it is saved again.

    Raises:
        DataError: the folder holds no adapter, or not one for this model.
    """
    check_adapter_folder(directory)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
            # It was saved on a quantised base, whose layers are no Conv1D: peft sees to it.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            adapted: PeftModel = PeftModel.from_pretrained(model, str(directory), is_trainable=True, torch_device="cpu")
    except RuntimeError as error:
        raise DataError(f"{directory}: the adapter does not fit the model: {' '.join(str(error).split())}") from error
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        found = set(file.keys())
    if strange := sorted(found ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=False))):
        raise DataError(f"{directory}: the adapter does not fit the model: {strange[0]} is only in one of them")
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def trained_in_full(model: PreTrainedModel | PeftModel) -> list[str]:
    """The layers that an adapter trains and saves as they are: those of the configuration, and a classifier head."""
    return sorted(model.peft_config["default"].modules_to_save or []) if isinstance(model, PeftModel) else []


def freeze(model: PreTrainedModel | PeftModel, patterns: Sequence[str]) -> None:
    """Excludes the parameters whose names match a shell-style pattern from training.

    Names are those of the model itself, with or without peft's prefix.

    Raises:
        DataError: a pattern matches nothing, or nothing is left to train.
    """
    parameters = {name.removeprefix(_PREFIX): parameter for name, parameter in model.named_parameters()}
    for pattern in patterns:
        matching = [
            parameter for name, parameter in parameters.items() if fnmatchcase(name, pattern.removeprefix(_PREFIX))
        ]
        if not matching:
            names = list(parameters)
            raise DataError(
                f"model.freeze: {pattern!r} matches no parameter; there are {len(names)}, such as "
                f"{', '.join([names[0], names[len(names) // 2], names[-1]])}"
            )
        for parameter in matching:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise DataError("model.freeze: nothing is left to train; remove a pattern")


def _check_names(names: Iterable[str], existing: Sequence[str], *, key: str, shown: Sequence[str]) -> None:
    for name in names:
        if not any(full == name or full.endswith(f".{name}") for full in existing):
            endings = dict.fromkeys(full.rpartition(".")[2] for full in shown)
            raise DataError(
                f"model.adapter.{key}: {name!r} matches no layer of the model; its layers are {', '.join(endings)}"
            )
