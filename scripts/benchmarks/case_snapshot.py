"""Case `snapshot`: VAMO's forward-only pass over the data, against bare inference.

LoRA adapters (r 8 on the query and value projections), float32, one probe by central differences: two evaluations of
every sample. The pass moves the adapters to each probe point, collates the batches and keeps the losses; inference
evaluates the same batches, collated beforehand, equally often.
"""

import torch

from scripts.benchmarks.methods import VAMO_LORA, build_ours, mean_loss
from scripts.benchmarks.results import CaseResult, compare
from scripts.benchmarks.setting import Setting
from scripts.benchmarks.timing import Contender, measure

__all__ = ["run_snapshot"]

_BATCHES = 4
_PASS, _BARE = "snapshot pass", "bare inference"


def run_snapshot(setting: Setting) -> CaseResult:
    """The pass over bare inference; seconds per pass."""
    samples = setting.samples(_BATCHES * setting.batch)
    method = build_ours(VAMO_LORA, setting.build_model(torch.float32), samples, setting)
    groups = samples.groups(range(samples.num_samples), token_budget=method.config.training.forward_batch_tokens)
    batches = [samples.batch(group).to(setting.device) for group in groups]
    step = 0

    def snapshot() -> None:
        nonlocal step
        work = method.estimator.prepare(samples, step)
        assert work.forward_samples == 2 * samples.num_samples, "a snapshot was due"
        step += 1

    def inference() -> None:
        method.module.eval()
        for _ in range(2):
            for batch in batches:
                mean_loss(method.objective, batch)

    timings = measure(
        [Contender(_PASS, snapshot), Contender(_BARE, inference)],
        repeats=setting.repeats,
        warmup=setting.warmup,
        device=setting.device,
    )
    return CaseResult([compare(f"LoRA, {samples.num_samples} samples, float32", timings, _PASS, _BARE)])
