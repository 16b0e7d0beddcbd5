"""Defaults that a method's name brings, applied before what the file says."""

from collections.abc import Mapping
from typing import Any

_FIRST_ORDER = {"training.max_grad_norm": 1.0}

_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "first_order": _FIRST_ORDER,
    "sgd": {**_FIRST_ORDER, "optimizer.name": "sgd"},
    "adamw": {**_FIRST_ORDER, "optimizer.name": "adamw"},
    "adagrad": {**_FIRST_ORDER, "optimizer.name": "adagrad"},
    "vamo": {**_FIRST_ORDER, "optimizer.name": "sgd"},
    "spsa": {"optimizer.name": "sgd"},
    "mezo": {"optimizer.name": "sgd", "method.directions.distribution": "gaussian"},
}


def preset_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value that `method.name` presets; MeZO's perturbation is ten times larger for adapters.

    Values follow the grids of Malladi et al. 2023 (arXiv 2305.17333, appendix E).

    Args:
        raw: the parsed file, before validation; an absent or unknown method presets nothing.
    """
    method = raw.get("method")
    name = method.get("name") if isinstance(method, Mapping) else None
    values = dict(_PRESETS.get(name, {})) if isinstance(name, str) else {}
    model = raw.get("model")
    if name == "mezo" and isinstance(model, Mapping) and model.get("adapter") is not None:
        values["method.eps"] = 1e-2
    return values
