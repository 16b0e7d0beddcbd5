"""The contracts between the layers; see each implementation for the mathematics."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vamo_ft.core.hashing import HashKey
from vamo_ft.core.second_moment import SecondMoment
from vamo_ft.core.types import Batch, Estimate, EvaluationTerms, LossTerms, Work

__all__ = [
    "Directions",
    "GradientEstimator",
    "Objective",
    "Progress",
    "ProgressTask",
    "Runtime",
    "SampleSource",
    "StateDict",
    "Stateful",
    "UpdateRule",
]

Item = TypeVar("Item")
Module = TypeVar("Module", bound=nn.Module)

StateDict = dict[str, Any]
"""A tree of dicts and lists with string keys whose leaves are tensors, numbers, strings, booleans or None.

A tensor of which every process holds some rows is a `core.sharding.Part` there; it comes back as this process's rows.
"""


class Stateful(Protocol):
    """Owns a part of the run's state."""

    def state_dict(self) -> StateDict:
        """What a resumed run needs."""

    def load_state_dict(self, state: StateDict) -> None:
        """Restores `state_dict`."""


class Objective(Protocol):
    """The loss of each sample of a batch, as a function of the module's parameters."""

    @property
    def module(self) -> nn.Module:
        """The module whose parameters are trained."""

    def terms(self, batch: Batch) -> LossTerms:
        """Per-sample summed losses and weights; differentiable when gradients are enabled."""

    def evaluate(self, batch: Batch) -> EvaluationTerms:
        """Losses and, for classification, whether the prediction is right; takes evaluation batches."""


class SampleSource(Protocol):
    """Random access to the training samples, and the order in which steps take them."""

    @property
    def num_samples(self) -> int:
        """Number of samples, indexed 0 to num_samples - 1."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples that steps draw in an epoch: `num_samples`, unless data sets are mixed by weights."""

    @property
    def batch_size(self) -> int:
        """Samples of one training step."""

    @property
    def fingerprint(self) -> str:
        """Hash of the content: equal exactly when every sample is."""

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples at `indices`, in that order, collated on the host."""

    def length(self, index: int) -> int:
        """Tokens of the longest row of the sample at `index`, without padding."""

    def frequency(self, index: int) -> float:
        """How often steps draw a sample, relative to the mean over all: 1, unless data sets are mixed by weights."""

    def groups(self, indices: Sequence[int], *, token_budget: int) -> list[tuple[int, ...]]:
        """`indices` sorted by length and cut so that samples times longest length stays within `token_budget`.

        A pure function of its arguments, so that a pass over the groups can be continued by position.
        """

    def step_indices(self, step: int) -> tuple[int, ...]:
        """The samples of training step `step` (counted from 0), known for every step in O(1)."""


class Runtime(Protocol):
    """Hides devices and processes.

    All processes of a run make the same steps on the same batches, and hold the same parameters; they share out the
    passes. What is marked as collective has to be called by all of them, in the same order.
    """

    @property
    def device(self) -> torch.device:
        """Where the model is."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks."""

    def alone(self) -> "Runtime":
        """The same device for work that every process does by itself."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes."""

    def backward(self, loss: Tensor) -> None:
        """Back-propagates a scalar."""

    @property
    def share(self) -> tuple[int, int]:
        """Of tensors that are shared out: the number of the part that this process holds, and how many there are."""

    def place(self, module: nn.Module) -> None:
        """Brings a module to the device, as a whole or, where processes share it out, its part; collective then."""

    def prepared(self, module: Module) -> Module | nn.Module:
        """The module whose passes, within `accumulating`, leave in `.grad` the sum over all processes; collective."""

    def accumulating(self, module: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Around a forward and backward pass of a prepared module; the last one of a step is collective.

        Every process has to make one last pass.
        """

    def evenly(self, total: int, *, at_most: int) -> int:
        """The size of pieces of `total` items, of which no process gets more than it has to."""

    def mine(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items that fall to this process, in their order."""

    def passes(self, items: Sequence[Item]) -> list[tuple[Item, bool]]:
        """What this process passes over, `mine` and, where processes have to keep in step, some that do not count.

        Returns:
            items, and whether each counts; those that do come first.
        """

    def rounds(self, items: Iterable[Item]) -> Iterator[tuple[Sequence[Item], Item | None, bool]]:
        """Deals items out, one to each process at a time: those of a round, which one to take, and whether it counts.

        All processes go through the same rounds. In the last one there may be none left for this process: it takes
        another one's, where it has to keep in step, or None.
        """

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over the processes, to the same bits everywhere; collective."""

    def largest_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each element by the largest over the processes; collective."""

    def from_main_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by the main process's; collective."""

    def agreed(self, value: Any) -> Any:
        """The main process's JSON value; collective."""

    def any(self, flag: bool) -> bool:
        """Whether any process says so; collective."""

    def differing(self, values: Callable[[], Tensor]) -> list[int]:
        """The places at which int64 values, made where there is something to compare, differ; collective."""

    def within_step(self, stop_requested: Callable[[], bool]) -> Callable[[], bool]:
        """What to ask between the passes of a step, of which processes may have different numbers."""


class ProgressTask(Protocol):
    """One running bar."""

    def advance(self, amount: int = 1) -> None:
        """Moves the bar by `amount` units."""

    def note(self, text: str) -> None:
        """Shows a few figures beside the bar."""


class Progress(Protocol):
    """Shows how far a long pass is."""

    def task(self, description: str, total: int, *, done: int = 0) -> AbstractContextManager[ProgressTask]:
        """A bar of `total` units, `done` of them behind us."""


class Directions(Protocol):
    """Perturbation directions over a fixed list of parameters, as pure functions of a key."""

    @property
    def numel(self) -> int:
        """d, the number of elements of a direction."""

    @property
    def rowwise(self) -> bool:
        """Whether some rows of a matrix can be displaced without the others, to the same bits."""

    def support(self, keys: Sequence[HashKey]) -> tuple[int, ...]:
        """Indices of the parameters that the directions reach, ascending."""

    def axpy_(
        self,
        tensors: Sequence[Tensor],
        coefficients: Tensor,
        keys: Sequence[HashKey],
        *,
        scales: Sequence[float] | None = None,
        rounding: HashKey | None = None,
        sources: Sequence[Tensor] | None = None,
        indices: Sequence[int] | None = None,
    ) -> None:
        """`p <- scale * source + sum_j coefficients[j] * z(keys[j])`, on the support.

        Tensors, scales and sources stand for the parameters `indices` (None: for all); without `sources` the tensors
        change in place.
        """

    def displaced_rows(
        self,
        values: Tensor,
        rows: Tensor,
        *,
        index: int,
        coefficients: Tensor,
        keys: Sequence[HashKey],
        rounding: HashKey | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """`values + sum_j coefficients[j] * z(keys[j])` for the given rows of one matrix, where `rowwise`.

        The result is written to `out` where there is one.
        """

    def dots(self, tensors: Sequence[Tensor | None], keys: Sequence[HashKey]) -> Tensor:
        """(m,) float64 inner products `<tensors, z(keys[j])>`; None stands for zeros."""

    def gram(self, keys: Sequence[HashKey]) -> Tensor:
        """(m, m) float64, `G_jk = <z_j, z_k>`."""

    def second_moment(self, gradients: Sequence[Tensor | None], keys: Sequence[HashKey]) -> SecondMoment:
        """`E[z z^T]` over what a step draws anew, beside a gradient (None stands for zeros)."""


class GradientEstimator(Stateful, Protocol):
    """Turns the micro-batches of one step into a gradient estimate and leaves parameter values bit-identical."""

    def prepare(self, source: SampleSource, step: int) -> Work:
        """Work due before step `step`, such as a snapshot.

        Raises:
            StopRequested: with what was done so far in the estimator's state.
        """

    def estimate(self, micro_batches: Sequence[Batch], step: int) -> Estimate:
        """The estimate over all micro-batches together; dense estimates overwrite `.grad`."""


class UpdateRule(Stateful, Protocol):
    """Moves the parameters along an estimate."""

    def apply(self, estimate: Estimate, *, learning_rate: float, step: int) -> Mapping[str, Tensor | float | None]:
        """One update; returns what it measured (`grad_norm`, before clipping, or None where it is not known)."""
