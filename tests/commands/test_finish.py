"""The final model where there is nothing to take it from."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vamo_ft.commands.finish import save_final_model
from vamo_ft.core.errors import SaveError
from vamo_ft.training.rundir import RunDirectory


def test_a_model_that_was_shared_out_and_never_saved(tmp_path: Path) -> None:
    """As where the disk was full at the last step, and checkpoint.on_error: continue went over it."""
    state, parameters = SimpleNamespace(step=8), SimpleNamespace(sharded=True)
    run: Any = SimpleNamespace(trainer=SimpleNamespace(state=state), evaluator=None, parameters=parameters)
    config: Any = None
    last = tmp_path / "checkpoints" / "step-00000008"
    said = (
        f"{tmp_path / 'model'}: was not written: with training.fsdp it is the model of the last checkpoint, which is "
        f"not there ({last}: there is no such checkpoint); make room, and run again to go on from the one before"
    )
    with pytest.raises(SaveError, match=f"^{re.escape(said)}$"):
        save_final_model(run, config, RunDirectory(tmp_path))
