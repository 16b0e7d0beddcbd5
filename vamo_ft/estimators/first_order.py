"""Back-propagation over the micro-batches of a step."""

from collections.abc import Sequence

import torch

from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Objective, Runtime, SampleSource, StateDict
from vamo_ft.core.runtime import seeded_generator
from vamo_ft.core.types import Batch, Estimate, Work

__all__ = ["FirstOrder"]


class FirstOrder:
    """`g = grad [ sum_i L_i / sum_i t_i ]` over all samples i of the step, accumulated into `.grad`.

    L_i is a sample's summed loss and t_i its weight, so the result does not depend on how the step is cut into
    micro-batches. Dropout is on, with masks keyed by (seed, step, micro-batch).
    """

    def __init__(self, objective: Objective, parameters: TrainableParameters, runtime: Runtime, *, seed: int) -> None:
        self._objective = objective
        self._parameters = parameters
        self._runtime = runtime
        self._seed = seed

    def prepare(self, source: SampleSource, step: int) -> Work:
        """Nothing is due."""
        return Work()

    def estimate(self, micro_batches: Sequence[Batch], step: int) -> Estimate:
        """One forward and one backward pass per sample."""
        self._parameters.clear_gradients()
        self._objective.module.train()
        device = self._runtime.device
        on_device = [batch.to(device) for batch in micro_batches]
        weight = torch.stack([batch.counts.double().sum() for batch in on_device]).sum()
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for position, batch in enumerate(on_device):
            with seeded_generator(HashKey(self._seed, Domain.DROPOUT, step, position), device):
                with self._runtime.autocast():
                    total = self._objective.terms(batch).total
                self._runtime.backward((total / weight.to(total.dtype)).sum())
            loss += total.detach().double().sum() / weight
        return Estimate(loss=loss, work=Work.forward(micro_batches) + Work.backward(micro_batches))

    def state_dict(self) -> StateDict:
        """Nothing is kept between steps."""
        return {}

    def load_state_dict(self, state: StateDict) -> None:
        """Nothing is kept between steps."""
