"""`vamo-ft methods`: what each method estimates, costs and holds in memory."""

from dataclasses import astuple, dataclass

from rich.table import Table

from vamo_ft.commands.console import output_console

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
    MethodSummary("vamo_literal", "corrected", "2 + q", "1", "1 + q", "5x + state", "2505.13954"),
    MethodSummary("addax", "mixed by length", "1 or 2q", "1 or 0", "-", "1x + state", "2410.06441"),
    MethodSummary("forward_gradient", "exact derivatives", "2q", "0", "-", "1x + state", "2202.08587"),
    MethodSummary("svrg", "corrected", "2", "2", "1", "4x + state", "2311.05589"),
    MethodSummary("spsa", "loss differences", "2q", "0", "-", "one layer", "Spall 1992"),
    MethodSummary("mezo", "loss differences", "2q", "0", "-", "one layer", "2305.17333"),
    MethodSummary("mezo_bcd", "loss differences", "2q", "0", "-", "one layer", "2501.19099"),
    MethodSummary("lozo", "loss differences", "2q", "0", "-", "one layer + factors", "2410.07698"),
    MethodSummary("subzero", "loss differences", "2q", "0", "-", "one layer + factors", "2410.08989"),
    MethodSummary("sparse_mezo", "loss differences", "2q", "0", "-", "one layer", "2402.15751"),
    MethodSummary("zo_adam", "loss differences", "2q", "0", "-", "3x", "2402.11592"),
    MethodSummary("zo_sign", "loss differences", "2q", "0", "-", "1x", "2402.11592"),
    MethodSummary("zo_momentum", "loss differences", "2q", "0", "-", "2x", "2402.11592"),
    MethodSummary("zo_svrg", "loss differences", "4q", "0", "2q", "2x + one layer", "1805.10367"),
    MethodSummary("mezo_svrg", "loss differences", "4q", "0", "2q", "2x + one layer", "2404.08080"),
)

LEGEND = (
    "forward, backward: passes per sample of a step; snapshot: forward passes per sample of a snapshot.",
    "svrg's snapshot also takes 1 backward pass; zo_svrg and mezo_svrg forward 1 in the snapshot's step.",
    "q: method.probes; n: training samples. difference: forward takes q + 1 passes, central 2q.",
    "memory: beyond the weights. 1x: one copy of the trained parameters, few with an adapter.",
    "state: the optimizer's (sgd and sign_sgd 0, with momentum 1x, adagrad 1x, adamw 2x).",
    "one layer: the largest, displaced while it runs; an optimizer but plain sgd adds 1x + state.",
    "factors: rank (m + n) floats per m x n matrix and probe; embedding and head are displaced whole.",
    "recompute: the value of method.source.",
    "addax: of a sample up to method.boundary tokens, or of a longer one.",
    "forward_gradient: a pass that carries a derivative along counts as two.",
    "source: arXiv number, or author and year.",
)


def methods() -> None:
    """Prints the table, at most 100 columns wide."""
    console = output_console(_WIDTH)
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for summary in METHODS:
        table.add_row(*astuple(summary))
    console.print(table)
    console.print()
    for line in LEGEND:
        console.print(line, highlight=False)
