from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations are written to the working directory, by which messages name them."""
    monkeypatch.chdir(tmp_path)
