"""Every key of the configuration file, with its unit, default and meaning (larger sections have files of their own).

`RunConfig` is the root. Names follow Hugging Face where the meaning is the same. Everything is frozen, and an unknown
key is an error. A rule that joins several keys stands in the smallest section that holds them all.
"""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from vamo_ft.config.comparison import CompareConfig
from vamo_ft.config.data import DataConfig, same_classes
from vamo_ft.config.method import (
    OPTIMIZERS,
    ForwardGradientConfig,
    MethodConfig,
    SvrgConfig,
    VamoConfig,
    ZoSvrgConfig,
)
from vamo_ft.config.model import ModelConfig
from vamo_ft.config.monitoring import CheckpointConfig, EvaluationConfig, LoggingConfig
from vamo_ft.config.objective import FREE_TEXT_METRICS, LossObjectiveConfig, MetricObjectiveConfig, ObjectiveConfig
from vamo_ft.config.optimizer import RULES, OptimizerConfig
from vamo_ft.config.period import Period
from vamo_ft.config.section import Section
from vamo_ft.config.sharing import why_not_shared
from vamo_ft.config.streaming import why_not_streamed
from vamo_ft.config.tasks import TaskFormat

_FORMAT_NEEDED = {
    "accuracy": "data.format.type: classification, or a task with options",
    **dict.fromkeys(FREE_TEXT_METRICS, "data.format.type: prompt_completion or chat, or the task squad or drop"),
    "perplexity": "data.format.type: prompt_completion, chat or text, or the task squad or drop",
}
"""Metric -> the formats in which it can be measured."""


class RunSection(Section):
    """Where the run is kept, and its seed."""

    name: str = Field(description="name of the run's directory under output_dir")
    output_dir: str = Field("runs", min_length=1, description="folder that holds run directories")
    seed: int = Field(42, ge=0, lt=2**63, description="seed of sample order, dropout and directions")
    offline: bool = Field(False, description="make no network call at all")

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, value: str) -> str:
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value) is None:
            raise ValueError(f"must be letters, digits, '.', '_' and '-', a letter or digit first, not {value!r}")
        return value


class ScheduleConfig(Section):
    """The learning rate over the run."""

    name: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="course after the warm-up: constant, or linear or half a cosine down to 0"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear increase from 0")


class TrainingConfig(Section):
    """Length and batch of the run."""

    steps: int | None = Field(None, gt=0, description="updates; write this or epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the data; write this or steps")
    batch_size: int = Field(16, gt=0, description="samples per update")
    micro_batch_size: Literal["auto"] | Annotated[int, Field(gt=0)] | None = Field(
        None,
        description="samples per forward and backward pass of a process; null: all; auto: as many as fit, found by "
        "halving before the first step. Changes memory, and the result only by rounding and by the masks of dropout",
    )
    max_grad_norm: float | None = Field(
        None, gt=0, description="clip the gradient's Euclidean norm; null: no clipping. First-order methods preset 1.0"
    )
    autocast: Literal["bfloat16"] | None = Field(None, description="precision of the arithmetic; null: the weights'")
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, a third more compute"
    )
    stream_layers: bool = Field(
        False,
        description="spsa along full or block directions with plain sgd: keep the model's layers in host memory, and "
        "two of them on the device. Every forward pass copies all of them there; results keep their bits",
    )
    forward_batch_tokens: int = Field(
        4096,
        gt=0,
        description="tokens, padding included, of one batch of a snapshot pass or an evaluation: forward only, and "
        "backward too for svrg",
    )
    max_seconds: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="wall-clock limit of one process, counted from where it takes the run directory: it then stops as "
        "on a signal, with a checkpoint and exit code 75. A process that goes on has as long again; null: no limit",
    )

    fsdp: bool = Field(
        False,
        description="several processes share the model out (FSDP2): each holds its part of every tensor, of its "
        "gradient and of what the optimizer keeps. One process holds all, as ever",
    )
    check_processes_every: Period | None = Field(
        Period(100, "step"),
        description="with several processes: how often they compare their parameters, beside every checkpoint; a "
        "difference stops the run. null: never",
    )

    on_divergence: Literal["stop", "rollback"] = Field(
        "stop",
        description="a loss or gradient that is not finite: stop before the update, or go back to the last checkpoint, "
        "leave that step out and go on with half the learning rate",
    )
    rollbacks: int = Field(3, gt=0, description="on_divergence: rollback: at most so many of them, then stop")

    @model_validator(mode="after")
    def _processes_keep_in_step(self) -> "TrainingConfig":
        if self.fsdp and self.micro_batch_size == "auto":
            raise ValueError(
                "micro_batch_size: auto lets each process find out what fits, and with fsdp none runs by itself; write "
                "a number, or leave fsdp out"
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("write exactly one of steps and epochs")
        return self

    @model_validator(mode="after")
    def _only_a_run_that_goes_back_counts_it(self) -> "TrainingConfig":
        if self.on_divergence == "stop" and self.rollbacks != type(self).model_fields["rollbacks"].default:
            raise ValueError("rollbacks: none are made; add on_divergence: rollback, or leave it out")
        return self


class RunConfig(Section):
    """The whole configuration file."""

    run: RunSection
    model: ModelConfig
    data: DataConfig
    method: MethodConfig
    objective: ObjectiveConfig = LossObjectiveConfig(type="loss")
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    compare: CompareConfig | None = Field(None, description="methods that 'vamo-ft compare' compares")

    @property
    def num_labels(self) -> int | None:
        """Classes of a classifier head; None: the model has none."""
        return len(self.data.format.classes) if self.model.task == "sequence_classification" else None

    @property
    def why_not_streamed(self) -> str | None:
        """Why `training.stream_layers` cannot be true; None: it can."""
        return why_not_streamed(self.method, self.optimizer, quantized=self.model.quantization is not None)

    @model_validator(mode="after")
    def _method_and_optimizer_agree(self) -> "RunConfig":
        name = self.method.name
        bare = "first_order" if self.method.needs_gradient else "mezo"
        rule = RULES[self.optimizer.name]
        if rule != OPTIMIZERS.get(name, rule):
            raise ValueError(
                f"optimizer.name: {self.optimizer.name} contradicts method.name: {name}; leave it out, or write "
                f"method.name: {bare}"
            )
        if name == "zo_momentum" and self.optimizer.momentum == 0:
            raise ValueError(
                f"optimizer.momentum: 0 contradicts method.name: {name}; leave it out, or write method.name: {bare}"
            )
        return self

    @model_validator(mode="after")
    def _master_weights_are_of_low_precision(self) -> "RunConfig":
        if not self.optimizer.master_weights:
            return self
        if self.model.dtype == "float32":
            raise ValueError(
                "optimizer.master_weights: the weights are float32 themselves; leave it out, or write model.dtype: "
                "bfloat16"
            )
        adapter = self.model.adapter
        if adapter is not None and not adapter.modules_to_save and self.model.task == "causal_lm":
            raise ValueError("optimizer.master_weights: adapters are float32 themselves; leave it out")
        if self.method.structure == "sparse" and self.optimizer.is_plain_sgd:
            raise ValueError(
                "optimizer.master_weights: method.directions.structure: sparse takes the smaller of the bfloat16 "
                "weights, which are not quite the smaller of the float32 ones; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _full_steps_have_a_learning_rate(self) -> "RunConfig":
        plain = self.optimizer.is_plain_sgd
        if isinstance(self.method, ZoSvrgConfig) and self.method.full_step_scale != 1 and not plain:
            raise ValueError(
                f"method.full_step_scale: {self.method.full_step_scale:g} is a second learning rate, which only plain "
                "sgd takes; write 1.0, or optimizer.name: sgd without momentum"
            )
        return self

    @model_validator(mode="after")
    def _sparse_directions_find_small_weights(self) -> "RunConfig":
        if self.method.structure == "sparse" and self.model.adapter:
            raise ValueError(
                "method.directions.structure: sparse takes the smaller weights of each tensor, and half of an "
                "adapter's are all zero at the start; leave model.adapter out, or write another structure"
            )
        return self

    @model_validator(mode="after")
    def _attention_has_a_forward_derivative(self) -> "RunConfig":
        kind = self.model.attn_implementation
        if isinstance(self.method, ForwardGradientConfig) and kind != "eager":
            raise ValueError(
                f"model.attn_implementation: {'null' if kind is None else kind} has no forward derivative, which "
                "method.name: forward_gradient needs; leave it out, or write eager"
            )
        return self

    @model_validator(mode="after")
    def _compiled_layers_are_differentiated_backward(self) -> "RunConfig":
        if self.model.compile and isinstance(self.method, ForwardGradientConfig):
            raise ValueError(
                "model.compile: method.name: forward_gradient takes forward derivatives, which compiled code has none "
                "of; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _weights_in_four_bits_are_differentiated_backward(self) -> "RunConfig":
        """On CUDA their products drop the derivative without a word."""
        if self.model.quantization is not None and isinstance(self.method, ForwardGradientConfig):
            raise ValueError(
                "model.quantization: method.name: forward_gradient takes forward derivatives, which products with "
                "weights in 4 bits have none of on CUDA; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _a_shared_out_model_can_be_trained(self) -> "RunConfig":
        if self.training.fsdp and (reason := why_not_shared(self)) is not None:
            raise ValueError(f"training.fsdp: {reason}")
        return self

    @model_validator(mode="after")
    def _streamed_layers_are_only_evaluated(self) -> "RunConfig":
        if self.training.stream_layers and (reason := self.why_not_streamed) is not None:
            raise ValueError(f"training.stream_layers: {reason}")
        return self

    @model_validator(mode="after")
    def _task_and_format_agree(self) -> "RunConfig":
        written = self.data.format
        if self.model.task == "sequence_classification":
            if not written.classes:
                raise ValueError(
                    "data.format.type: a sequence_classification model needs classification, or a task with classes"
                )
            if isinstance(written, TaskFormat) and written.shots > 0:
                raise ValueError("data.format.shots: a sequence_classification model goes on with no text; write 0")
        for name in self.evaluation.metrics:
            if name not in ("loss", *written.metrics):
                raise ValueError(f"evaluation.metrics: {name} needs {_FORMAT_NEEDED[name]}")
        return self

    @model_validator(mode="after")
    def _there_is_data_to_find_the_best_model_on(self) -> "RunConfig":
        if self.evaluation.ranked_by is not None and self.data.evaluation is None:
            raise ValueError(
                "data.evaluation: required to find the best model; name held-out data, or leave "
                "evaluation.metric_for_best_model, load_best_model_at_end and early_stopping_patience out"
            )
        return self

    @model_validator(mode="after")
    def _compared_metric_is_evaluated(self) -> "RunConfig":
        if self.compare is None:
            return self
        if self.data.evaluation is None:
            raise ValueError("data.evaluation: a comparison needs held-out data")
        if self.compare.metric not in (None, *self.evaluation.metrics):
            raise ValueError(f"compare.metric: {self.compare.metric} is not one of evaluation.metrics")
        return self

    @model_validator(mode="after")
    def _metric_objective_can_be_trained(self) -> "RunConfig":
        if not isinstance(self.objective, MetricObjectiveConfig):
            return self
        if self.method.needs_gradient:
            raise ValueError(
                f"objective.type: metric has no gradient, which method.name: {self.method.name} needs; write "
                "method.name: mezo, or objective.type: loss"
            )
        if (name := self.objective.name) not in self.data.format.metrics:
            raise ValueError(f"objective.name: {name} needs {_FORMAT_NEEDED[name]}")
        if self.data.packing:
            raise ValueError("data.packing: objective.type: metric scores samples one by one; leave it out")
        return self

    @model_validator(mode="after")
    def _attention_keeps_documents_apart(self) -> "RunConfig":
        if self.data.packing and self.model.attn_implementation == "flash_attention_2":
            raise ValueError(
                "data.packing: flash_attention_2 keeps documents apart in one row at a time only; leave "
                "model.attn_implementation out, or write sdpa"
            )
        return self

    @model_validator(mode="after")
    def _classes_agree(self) -> "RunConfig":
        if self.model.task != "sequence_classification" and not isinstance(self.objective, MetricObjectiveConfig):
            return self
        if not all(each is None or same_classes(each, self.data.format) for each in self.data.own_formats):
            raise ValueError(
                "data.train: a classifier head, and an objective of type metric, need every data set's own format to "
                "have data.format's type and labels"
            )
        return self

    @model_validator(mode="after")
    def _snapshot_subset_is_large(self) -> "RunConfig":
        if isinstance(self.method, VamoConfig | SvrgConfig | ZoSvrgConfig):
            subset, least = self.method.snapshot.subset, 8 * self.method.snapshot.every.count * self.training.batch_size
            if subset is not None and subset < least:
                raise ValueError(
                    f"method.snapshot.set.subset: {subset} is below {least} = 8 * every * training.batch_size; a "
                    "smaller set mostly corrects towards the steps it is about to score"
                )
        return self
