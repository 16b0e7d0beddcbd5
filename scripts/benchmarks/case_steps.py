"""Cases `mezo` and `mezo_bcd`: whole zeroth-order steps.

A step of ours is compared with the literal MeZO step on the same batch, and with what it cannot do without: two bare
forward passes. All of them share one model, whose weights are therefore equally warm or cold in the caches.
"""

import torch

from scripts.benchmarks.literal_mezo import LiteralMezo
from scripts.benchmarks.methods import EPS, LEARNING_RATE, Ours, Values, build_ours, mean_loss, objective_of, spsa
from scripts.benchmarks.results import CaseResult, at_least, at_most, compare
from scripts.benchmarks.setting import Setting
from scripts.benchmarks.timing import Contender, measure
from vamo_ft.core.parameters import TrainableParameters

__all__ = ["run_mezo", "run_mezo_bcd"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_DISTRIBUTIONS = ("rademacher", "gaussian", "sphere")
_LITERAL, _FORWARDS = "literal MeZO", "two forwards"
_MEZO = {"float32": at_least(2.7, 4.0), "bfloat16": at_least(4.0, 7.0)}
_MEZO_FORWARDS = {"float32": at_most(1.4, 1.2)}
_BCD = {"float32": at_least(4.0, 6.0), "bfloat16": at_least(8.0, 15.0)}
_BCD_FORWARDS = at_most(0.95, 0.8)


def run_mezo(setting: Setting) -> CaseResult:
    """Literal MeZO against ours in three distributions, and ours against two forward passes; seconds per step."""
    result = CaseResult()
    for dtype in setting.precisions:
        bench = _Bench(setting, dtype)
        ours = {f"ours {name}": bench.ours(spsa(distribution=name)) for name in _DISTRIBUTIONS}
        timings = measure(
            [bench.literal(), *(bench.steps(name, method) for name, method in ours.items()), bench.forwards()],
            repeats=setting.repeats,
            warmup=setting.warmup,
            device=setting.device,
        )
        for name in ours:
            result.rows.append(compare(f"step {dtype}", timings, _LITERAL, name, target=_MEZO[dtype]))
        for name in ours:
            target = _MEZO_FORWARDS.get(dtype)
            result.rows.append(compare(f"step {dtype}", timings, name, _FORWARDS, target=target))
    return result


def run_mezo_bcd(setting: Setting) -> CaseResult:
    """The block-coordinate step against the same two; seconds per step, averaged over a whole cycle of blocks.

    The others cost the same at every step: they run less often, in between.
    """
    result = CaseResult()
    cycle, name = setting.num_blocks, "ours block"
    for dtype in setting.precisions:
        bench = _Bench(setting, dtype)
        method = bench.ours(spsa(structure="block"))
        timings = measure(
            [
                bench.literal(turns=max(1, cycle // 16)),
                bench.steps(name, method, turns=cycle),
                bench.forwards(turns=max(1, cycle // 4)),
            ],
            repeats=setting.repeats,
            warmup=setting.warmup,
            device=setting.device,
        )
        result.rows.append(compare(f"step {dtype}", timings, _LITERAL, name, target=_BCD[dtype]))
        result.rows.append(compare(f"step {dtype}", timings, name, _FORWARDS, target=_BCD_FORWARDS))
    return result


class _Bench:
    """A model in one precision, a batch, and the contenders over both."""

    def __init__(self, setting: Setting, dtype: str) -> None:
        self._setting = setting
        self._dtype = dtype
        self._model = setting.build_model(_DTYPES[dtype])
        self._batch = setting.one_batch()
        self._objective = objective_of(self._model)
        self._literal_steps = 0

    def ours(self, values: Values) -> Ours:
        """One of our methods over the model."""
        samples = self._setting.samples(self._setting.batch)
        return build_ours(values, self._model, samples, self._setting, dtype=self._dtype)

    def literal(self, *, turns: int = 1) -> Contender:
        """The paper's step."""
        parameters = TrainableParameters(self._model).tensors
        mezo = LiteralMezo(
            parameters, lambda: mean_loss(self._objective, self._batch), eps=EPS, learning_rate=LEARNING_RATE
        )

        def run() -> None:
            mezo.step(self._literal_steps)
            self._literal_steps += 1

        return Contender(_LITERAL, run, turns)

    def steps(self, name: str, method: Ours, *, turns: int = 1) -> Contender:
        """Our step."""

        def run() -> None:
            method.step([self._batch])

        return Contender(name, run, turns)

    def forwards(self, *, turns: int = 1) -> Contender:
        """Two forward passes, nothing else."""

        def run() -> None:
            float(mean_loss(self._objective, self._batch) - mean_loss(self._objective, self._batch))

        return Contender(_FORWARDS, run, turns)
