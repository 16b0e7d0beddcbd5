from itertools import pairwise
from pathlib import Path

import pytest

from vamo_ft.commands.init import init, starter_config
from vamo_ft.config.load import load_config
from vamo_ft.config.method import METHOD_NAMES
from vamo_ft.core.errors import UsageError


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_the_starter_is_valid_and_commented(method: str, tmp_path: Path) -> None:
    out = tmp_path / "config.yaml"
    init(method=method, out=out)
    config = load_config(out).config
    assert config.method.name == method
    assert (config.model.adapter is None) == (method == "sparse_mezo")
    assert config.data.format.type == "classification"
    assert list(config.data.format.labels.items()) == [("0", " terrible"), ("1", " great")]
    lines = out.read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 110
    for above, line in pairwise(lines):
        if line and not line.lstrip().startswith("#"):
            indent = line[: len(line) - len(line.lstrip())]
            assert above.startswith(f"{indent}# "), line


@pytest.mark.parametrize(
    ("method", "optimizer", "learning_rate", "max_grad_norm"),
    [
        ("vamo", "adamw", 1e-3, 1.0),
        ("mezo", "sgd", 5e-5, None),
        ("spsa", "sgd", 5e-5, None),
        ("lozo", "sgd", 5e-5, None),
        ("zo_sign", "sign_sgd", 1e-5, None),
        ("adagrad", "adagrad", 1e-2, 1.0),
    ],
)
def test_settings(
    method: str, optimizer: str, learning_rate: float, max_grad_norm: float | None, tmp_path: Path
) -> None:
    init(method=method, out=tmp_path / "c.yaml")
    config = load_config(tmp_path / "c.yaml").config
    assert (config.optimizer.name, config.optimizer.learning_rate) == (optimizer, learning_rate)
    assert config.training.max_grad_norm == max_grad_norm
    if max_grad_norm is None:
        assert config.method.eps == 1e-2


def test_comments_are_the_schemas_own() -> None:
    text = starter_config("vamo")
    assert "  # peak learning rate; it has no default\n  learning_rate: 0.001\n" in text
    assert "\n# Length and batch of the run.\ntraining:\n" in text


def test_an_existing_file_stays(tmp_path: Path) -> None:
    out = tmp_path / "config.yaml"
    out.write_text("mine")
    with pytest.raises(UsageError, match=r"config\.yaml: exists already; name another file with --out$"):
        init(method="vamo", out=out)
    assert out.read_text() == "mine"


def test_unknown_method_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--method meso: no such method; did you mean 'mezo'\?$"):
        init(method="meso", out=tmp_path / "a")
    with pytest.raises(UsageError, match=r"^--method 7: no such method; choose one of first_order, sgd,"):
        init(method="7", out=tmp_path / "a")
    with pytest.raises(UsageError, match=r"a/b/c: cannot be written: No such file or directory$"):
        init(method="vamo", out=tmp_path / "a/b/c")
