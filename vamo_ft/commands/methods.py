"""`vamo-ft methods`: what each method estimates, costs and holds in memory."""

from dataclasses import astuple, dataclass

from rich.console import Console
from rich.table import Table

__all__ = ["COLUMNS", "LEGEND", "METHODS", "MethodSummary", "methods"]

_WIDTH = 100


@dataclass(frozen=True, slots=True)
class MethodSummary:
    """One line of the table.

    Attributes:
        name: value of `method.name`, with the setting that tells two forms apart.
        estimate: where the gradient comes from.
        forward: forward passes per sample of a step.
        backward: backward passes per sample of a step.
        snapshot: forward passes per scored sample of a snapshot.
        memory: held beyond the weights and activations.
        source: where the method was published, as an arXiv number or author and year.
    """

    name: str
    estimate: str
    forward: str
    backward: str
    snapshot: str
    memory: str
    source: str


COLUMNS = ("method", "gradient", "forward", "backward", "snapshot", "memory", "source")

METHODS = (
    MethodSummary("first_order", "back-propagation", "1", "1", "-", "1x + state", "-"),
    MethodSummary("sgd", "back-propagation", "1", "1", "-", "1x, momentum 2x", "-"),
    MethodSummary("adamw", "back-propagation", "1", "1", "-", "3x", "1711.05101"),
    MethodSummary("adagrad", "back-propagation", "1", "1", "-", "2x", "Duchi 2011"),
    MethodSummary("vamo", "corrected", "1", "1", "2q", "1x + state + 4nq bytes", "2505.13954"),
    MethodSummary("vamo, recompute", "corrected", "1 + 2q", "1", "2q", "4x + state + 4nq bytes", "2505.13954"),
    MethodSummary("spsa", "loss differences", "2q", "0", "-", "1x", "Spall 1992"),
    MethodSummary("mezo", "loss differences", "2q", "0", "-", "1x", "2305.17333"),
)

LEGEND = (
    "forward, backward: passes per sample of a step; snapshot: forward passes per sample of a snapshot.",
    "q: method.probes; n: training samples. difference: forward takes q + 1 passes, central 2q.",
    "memory: beyond the weights. 1x: one copy of the trained parameters, few with an adapter.",
    "state: the optimizer's (sgd 0, with momentum 1x, adagrad 1x, adamw 2x). With an optimizer other",
    "than plain sgd, spsa and mezo hold 1x + state. recompute: the value of method.source.",
    "source: arXiv number, or author and year.",
)


def methods() -> None:
    """Prints the table, at most 100 columns wide."""
    console = Console()
    if not console.is_terminal or console.width > _WIDTH:
        console = Console(width=_WIDTH)
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for summary in METHODS:
        table.add_row(*astuple(summary))
    console.print(table)
    console.print()
    for line in LEGEND:
        console.print(line, highlight=False)
