"""Back-propagation over the micro-batches of a step."""

from collections.abc import Sequence

from torch import Tensor

from vamo_ft.core.errors import UsageError
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.core.losses import LossModule
from vamo_ft.core.parameters import TrainableParameters
from vamo_ft.core.protocols import Objective, Runtime
from vamo_ft.core.runtime import seeded_generator
from vamo_ft.core.types import Batch, Estimate, Work, total_count
from vamo_ft.estimators.sharing import put_together
from vamo_ft.estimators.stateless import Stateless

__all__ = ["FirstOrder"]


class FirstOrder(Stateless):
    """`g = grad [ sum_i L_i / sum_i t_i ]` over all samples i of the step, accumulated into `.grad`.

    L_i is a sample's summed loss and t_i its weight, so the result does not depend on how the step is cut into
    micro-batches and shared out over processes. Dropout is on, with masks keyed by (seed, step, micro-batch).

    The first estimate makes sure that every trainable tensor gets a gradient: one that gets none would be trained by
    weight decay alone, and several processes would wait for it.
    """

    def __init__(self, objective: Objective, parameters: TrainableParameters, runtime: Runtime, *, seed: int) -> None:
        self._losses = runtime.prepared(LossModule(objective))
        self._parameters = parameters
        self._runtime = runtime
        self._seed = seed
        self._reaches_all = False

    def estimate(self, micro_batches: Sequence[Batch], step: int) -> Estimate:
        """One forward and one backward pass per sample.

        Raises:
            UsageError: the loss does not depend on some trainable tensors.
        """
        self._parameters.clear_gradients()
        self._losses.train()
        device = self._runtime.device
        weight = total_count(micro_batches, device)
        passes = self._runtime.passes(list(enumerate(micro_batches)))
        losses: list[Tensor] = []
        for number, ((position, batch), counts) in enumerate(passes, start=1):
            with (
                seeded_generator(HashKey(self._seed, Domain.DROPOUT, step, position), device),
                self._runtime.accumulating(self._losses, last=number == len(passes)),
            ):
                with self._runtime.autocast():
                    total: Tensor = self._losses(batch.to(device))
                self._runtime.backward(float(counts) * (total / weight.to(total.dtype)).sum())
            if counts:
                losses.append(total.detach().double())
        if not self._reaches_all:
            self._check_reach()
        totals = put_together(self._runtime, micro_batches, losses)
        return Estimate(loss=totals.sum() / weight, work=Work.forward(micro_batches) + Work.backward(micro_batches))

    def _check_reach(self) -> None:
        names, tensors = self._parameters.names, self._parameters.tensors
        missed = [name for name, tensor in zip(names, tensors, strict=True) if tensor.grad is None]
        if missed:
            patterns = ", ".join(_covering(missed, names))
            raise UsageError(
                f"model.freeze: the loss does not depend on {len(missed)} of the {len(names)} trained tensors, such as "
                f"{missed[0]}; they learn nothing, so leave them out: add {patterns}"
            )
        self._reaches_all = True


def _covering(some: Sequence[str], names: Sequence[str]) -> Sequence[str]:
    """Patterns that match `some` of the names and no others: `head.*` where all of the head's are among them."""
    others = set(names) - set(some)
    found: dict[str, None] = {}
    for name in some:
        parts = name.split(".")
        heads = (".".join(parts[:depth]) + "." for depth in range(1, len(parts)))
        head = next((head for head in heads if not any(other.startswith(head) for other in others)), None)
        found[name if head is None else f"{head}*"] = None
    return list(found)
