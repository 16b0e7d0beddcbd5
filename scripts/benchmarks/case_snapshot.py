"""Case `snapshot`: VAMO's forward-only pass over the data, against bare inference.

LoRA adapters (r 8 on the query and value projections), float32, one probe by central differences: two evaluations of
every sample. The pass moves the adapters to each probe point, collates the batches and keeps the losses; inference
evaluates batches collated beforehand, equally often: the same ones, and other sizes, of which the fastest counts.
"""

import statistics
from collections.abc import Callable

import torch

from scripts.benchmarks.methods import VAMO_LORA, build_ours, mean_loss
from scripts.benchmarks.results import CaseResult, at_most, compare
from scripts.benchmarks.setting import Setting
from scripts.benchmarks.timing import Contender, measure

__all__ = ["run_snapshot"]

_BATCHES = 8
_PASS, _BARE = "snapshot pass", "bare inference"
_TARGET = at_most(reach=1 / 0.9, aim=1.0)


def run_snapshot(setting: Setting) -> CaseResult:
    """The pass over bare inference; seconds per pass."""
    samples = setting.samples(_BATCHES * setting.batch)
    method = build_ours(VAMO_LORA, setting.build_model(torch.float32), samples, setting)
    budget = method.config.training.forward_batch_tokens
    step = 0

    def snapshot() -> None:
        nonlocal step
        work = method.estimator.prepare(samples, step)
        assert work.forward_samples == 2 * samples.num_samples, "a snapshot was due"
        step += 1

    def inference(token_budget: int) -> Callable[[], None]:
        groups = samples.groups(range(samples.num_samples), token_budget=token_budget)
        batches = [samples.batch(group).to(setting.device) for group in groups]

        def run() -> None:
            method.module.eval()
            for _ in range(2):
                for batch in batches:
                    mean_loss(method.objective, batch)

        return run

    bare = {f"{_BARE}, {tokens} tokens a batch": inference(tokens) for tokens in (budget // 4, budget // 2, budget)}
    timings = measure(
        [Contender(_PASS, snapshot), *(Contender(name, run) for name, run in bare.items())],
        repeats=setting.repeats,
        warmup=setting.warmup,
        device=setting.device,
    )
    best = min(bare, key=lambda name: statistics.median(timings[name]))
    same = f"{_BARE}, {budget} tokens a batch"
    name = f"LoRA, {samples.num_samples} samples, float32"
    return CaseResult(
        [
            compare(name, timings, _PASS, best, target=_TARGET),
            *([] if best == same else [compare(name, timings, _PASS, same)]),
        ]
    )
