"""What a method begins with where nobody has said more: in `vamo-ft init`, and as one of several that are compared."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["STARTERS", "Starter"]


@dataclass(frozen=True, slots=True)
class Starter:
    """What differs between methods.

    Attributes:
        optimizer: its name.
        learning_rate: for what is trained, an adapter or the weights.
        steps: length of the run.
        method: keys of the method section beside its name.
        adapter: whether a LoRA adapter is trained, or the weights.
        schedule: the schedule section.
    """

    optimizer: str
    learning_rate: float
    steps: int
    method: Mapping[str, Any]
    adapter: bool = True
    schedule: Mapping[str, Any] = field(default_factory=lambda: {"name": "linear", "warmup_steps": 50})


_ZEROTH_ORDER = Starter("sgd", 5e-5, 5000, {"probes": 1, "eps": 1e-2}, schedule={"name": "constant"})

STARTERS: Mapping[str, Starter] = {
    "first_order": Starter("adamw", 1e-3, 1000, {}),
    "sgd": Starter("sgd", 1e-1, 1000, {}),
    "adamw": Starter("adamw", 1e-3, 1000, {}),
    "adagrad": Starter("adagrad", 1e-2, 1000, {}),
    "vamo_literal": Starter("sgd", 1e-1, 1000, {"probes": 1, "radius": 1.5, "snapshot": {"every": "1 epoch"}}),
    "addax": Starter("sgd", 1e-2, 1000, {"boundary": 32, "weight": 1e-3, "probes": 1, "eps": 1e-2}),
    "forward_gradient": replace(_ZEROTH_ORDER, method={"probes": 1}),
    "spsa": _ZEROTH_ORDER,
    "mezo": _ZEROTH_ORDER,
    "mezo_bcd": _ZEROTH_ORDER,
    "lozo": _ZEROTH_ORDER,
    "subzero": _ZEROTH_ORDER,
    "sparse_mezo": replace(_ZEROTH_ORDER, learning_rate=1e-6, method={"probes": 1, "eps": 1e-3}, adapter=False),
    "zo_adam": replace(_ZEROTH_ORDER, optimizer="adamw", learning_rate=1e-4),
    "zo_sign": replace(_ZEROTH_ORDER, optimizer="sign_sgd", learning_rate=1e-5),
    "zo_momentum": replace(_ZEROTH_ORDER, learning_rate=5e-6),
    "zo_svrg": replace(  # the steps of a period share the snapshot's directions: together as long as one of mezo
        _ZEROTH_ORDER,
        learning_rate=5e-6,
        method={"probes": 1, "eps": 1e-2, "snapshot": {"every": "8 steps", "set": {"subset": 1024}}},
    ),
    "mezo_svrg": replace(  # the full step is as long as one of mezo
        _ZEROTH_ORDER,
        learning_rate=5e-6,
        method={
            "probes": 1,
            "eps": 1e-2,
            "snapshot": {"every": "2 steps", "set": {"subset": 512}},
            "full_step_scale": 10.0,
        },
    ),
    "svrg": Starter(
        "adamw",
        1e-3,
        1000,
        {"alpha": 1.0, "alpha_decay": "linear", "snapshot": {"every": "1 epoch", "set": "all"}},
    ),
    "vamo": Starter("adamw", 1e-3, 1000, {"probes": 4, "eps": "auto", "snapshot": {"every": "1 epoch", "set": "all"}}),
}
