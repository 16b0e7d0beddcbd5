"""Defaults that a method's name brings, applied before what the file says."""

import copy
from collections.abc import Mapping
from typing import Any

_FIRST_ORDER = {"training.max_grad_norm": 1.0}
_ZEROTH_ORDER = {"optimizer.name": "sgd", "method.directions.distribution": "gaussian"}

_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "first_order": _FIRST_ORDER,
    "sgd": {**_FIRST_ORDER, "optimizer.name": "sgd"},
    "adamw": {**_FIRST_ORDER, "optimizer.name": "adamw"},
    "adagrad": {**_FIRST_ORDER, "optimizer.name": "adagrad"},
    "vamo": {**_FIRST_ORDER, "optimizer.name": "sgd"},
    "vamo_literal": {**_FIRST_ORDER, "optimizer.name": "sgd"},
    "addax": _ZEROTH_ORDER,
    "forward_gradient": {"optimizer.name": "sgd", "model.attn_implementation": "eager"},
    "svrg": {**_FIRST_ORDER, "optimizer.name": "sgd"},
    "spsa": {"optimizer.name": "sgd"},
    "mezo": _ZEROTH_ORDER,
    "mezo_bcd": {**_ZEROTH_ORDER, "method.directions.structure": "block"},
    "lozo": {**_ZEROTH_ORDER, "method.directions.structure": "low_rank"},
    "subzero": {**_ZEROTH_ORDER, "method.directions.structure": "subspace"},
    "sparse_mezo": {**_ZEROTH_ORDER, "method.directions.structure": "sparse"},
    "zo_adam": {**_ZEROTH_ORDER, "optimizer.name": "adamw"},
    "zo_sign": {**_ZEROTH_ORDER, "optimizer.name": "sign_sgd"},
    "zo_momentum": {**_ZEROTH_ORDER, "optimizer.momentum": 0.9},
    "zo_svrg": _ZEROTH_ORDER,
    "mezo_svrg": {**_ZEROTH_ORDER, "method.snapshot.every": "2 steps", "method.full_step_scale": 10.0},
}


def preset_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value that `method.name` presets; the perturbation of MeZO and its kin is ten times larger for
    adapters.

    Values follow the grids of Malladi et al. 2023 (arXiv 2305.17333, appendix E). Those of mezo_svrg follow its
    authors' scripts: a full step every second step, lr1 in {1e-5, 1e-4} and lr2 in {1e-6, 1e-5}.

    Args:
        raw: the parsed file, before validation; an absent or unknown method presets nothing.
    """
    method = raw.get("method")
    name = method.get("name") if isinstance(method, Mapping) else None
    values = dict(_PRESETS.get(name, {})) if isinstance(name, str) else {}
    optimizer, model = raw.get("optimizer"), raw.get("model")
    if name == "zo_momentum" and isinstance(optimizer, Mapping) and optimizer.get("name", "sgd") != "sgd":
        del values["optimizer.momentum"]  # the contradiction is told in terms of what is written
    if _ZEROTH_ORDER.keys() <= values.keys() and isinstance(model, Mapping) and model.get("adapter") is not None:
        values["method.eps"] = 1e-2
    return values


def with_presets(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the values, with what the method's name presets where nothing is written."""
    values = copy.deepcopy(dict(raw))
    for key, value in preset_values(raw).items():
        *path, last = key.split(".")
        section: Any = values
        for part in path:
            section = section.setdefault(part, {}) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.setdefault(last, value)
    return values
