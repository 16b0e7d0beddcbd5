"""Case `first_order`: a step of back-propagation with AdamW, ours and transformers' Trainer's.

Same samples (-100 on the prompt for the Trainer), same batch size, learning rate, weight decay 0 and clipping at norm
1; no logging, saving or evaluation. Each trains a float32 model of its own. A turn is a short training of which the
first step (which allocates the optimizer's state) does not count; fetching and collating the batches does.
"""

import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from scripts.benchmarks.methods import ADAMW, build_ours
from scripts.benchmarks.results import CaseResult, at_least, compare
from scripts.benchmarks.setting import RandomSamples, Setting
from scripts.benchmarks.timing import Contender, measure, synchronise

__all__ = ["run_first_order"]

_UNCOUNTED, _COUNTED = 1, 3  # steps of one turn
_OURS, _TRAINER, _FUSED = "ours", "Trainer, adamw_torch", "Trainer, adamw_torch_fused"


def run_first_order(setting: Setting) -> CaseResult:
    """The Trainer with the optimizer that ours uses, and with its default one, against ours; seconds per step."""
    samples = setting.samples(setting.batch * (_UNCOUNTED + _COUNTED))
    theirs = setting.build_model(torch.float32)
    timings = measure(
        [
            Contender(_TRAINER, _trainer(setting, samples, theirs, optimizer="adamw_torch")),
            Contender(_OURS, _ours(setting, samples)),
            Contender(_FUSED, _trainer(setting, samples, theirs, optimizer="adamw_torch_fused")),
        ],
        repeats=setting.repeats,
        warmup=setting.warmup,
        device=setting.device,
    )
    return CaseResult(
        [
            compare("step float32", timings, _TRAINER, _OURS, target=at_least(1.1, 1.25)),
            compare("step float32", timings, _FUSED, _OURS),
        ]
    )


def _ours(setting: Setting, samples: RandomSamples) -> Callable[[], float]:
    method = build_ours(ADAMW, setting.build_model(torch.float32), samples, setting)

    def run() -> float:
        began = 0.0
        for number in range(_UNCOUNTED + _COUNTED):
            if number == _UNCOUNTED:
                synchronise(setting.device)
                began = time.perf_counter()
            method.step([samples.batch(samples.step_indices(method.step_number))])
        synchronise(setting.device)
        return (time.perf_counter() - began) / _COUNTED

    return run


def _trainer(setting: Setting, samples: RandomSamples, model: nn.Module, *, optimizer: str) -> Callable[[], float]:
    rows = [
        {
            "input_ids": list(example.token_ids),
            "attention_mask": [1] * setting.length,
            "labels": [-100] * len(example.prompt_ids) + list(example.completion_ids),
        }
        for example in samples.examples
    ]

    def run() -> float:
        stopwatch = _Stopwatch(setting.device)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=setting.batch,
                max_steps=_UNCOUNTED + _COUNTED,
                optim=optimizer,
                learning_rate=ADAMW["optimizer"]["learning_rate"],
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=ADAMW["training"]["max_grad_norm"],
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=setting.device.type == "cpu",
                dataloader_pin_memory=setting.device.type == "cuda",
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the libraries' own, about each other
                trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[stopwatch])
                trainer.remove_callback(PrinterCallback)
                trainer.train()
        return stopwatch.seconds / _COUNTED

    return run


class _Stopwatch(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by the type checker
    """Seconds from the end of the last uncounted step to the end of the last step."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device
        self._began = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronise(self._device)
        if state.global_step == _UNCOUNTED:
            self._began = time.perf_counter()
        self.seconds = time.perf_counter() - self._began
