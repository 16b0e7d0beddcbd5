from pathlib import Path

import pytest

from tests.config.examples import REQUIRED, VALID, load_text, problems_of
from vamo_ft.config.errors import ConfigError
from vamo_ft.config.load import dump_config, load_config, resolved_values
from vamo_ft.config.method import METHOD_NAMES, OPTIMIZERS
from vamo_ft.config.period import Period


def test_values_and_sources() -> None:
    loaded = load_text(VALID, "training.batch_size=4")
    assert loaded.config.optimizer.learning_rate == 1e-3
    assert loaded.config.training.batch_size == 4
    assert loaded.config.logging.every == Period(10, "step")
    assert {key: source for key, source in loaded.sources.items() if source != "default"} == {
        "run.name": "config.yaml:2",
        "model.path": "config.yaml:4",
        "data.train.path": "config.yaml:6",
        "data.format.type": "config.yaml:8",
        "method.name": "config.yaml:10",
        "optimizer.name": "config.yaml:12",
        "optimizer.learning_rate": "config.yaml:13",
        "training.steps": "config.yaml:15",
        "training.batch_size": "--set",
        "training.max_grad_norm": "preset vamo",
    }
    assert loaded.sources.keys() == resolved_values(loaded.config).keys()


def test_label_keys_become_text() -> None:
    labels = 'type: classification\n    template: "{x}"\n    labels: {0: no, no: " no", true: yes, 1.5: x}'
    loaded = load_text(VALID.replace("type: prompt_completion", labels))
    assert loaded.config.data.format.labels == {"0": "no", "no": " no", "True": "yes", "1.5": "x"}
    assert loaded.sources["data.format.labels.0"] == "config.yaml:10"


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_dump_loads_to_an_equal_config(method: str) -> None:
    text = VALID.replace("name: adamw", f"name: {OPTIMIZERS.get(method, 'sgd')}").replace("vamo", method)
    adapter = [] if method == "sparse_mezo" else ["model.adapter.type=lora"]
    required = REQUIRED.get(method, [])
    config = load_text(text, *required, *adapter, "optimizer.weight_decay=1e-5").config
    assert load_text(dump_config(config)).config == config
    unclipped = load_text(text, *required, "training.max_grad_norm=null").config
    assert load_text(dump_config(unclipped)).config == unclipped


def test_dump_keeps_unions_and_text() -> None:
    text = VALID.replace(
        "type: prompt_completion",
        'type: classification\n    template: "{x}: é\\n"\n    labels: {no: no, 1: "1e-3", "null": " "}',
    )
    config = load_text(text, "method.snapshot={every: 2 steps, set: {subset: 512}}", "optimizer.betas=[0, 0.5]").config
    assert load_text(dump_config(config)).config == config


# Presets


def test_a_preset_lies_between_default_and_file() -> None:
    assert load_text(VALID).config.training.max_grad_norm == 1.0
    assert load_text(VALID + "  max_grad_norm: null\n").config.training.max_grad_norm is None
    assert load_text(VALID, "training.max_grad_norm=3.5").config.training.max_grad_norm == 3.5


def test_a_preset_completes_a_section() -> None:
    loaded = load_text(VALID.replace("  name: adamw\n", ""), "method.name=mezo", "method.directions={structure: full}")
    assert loaded.config.optimizer.name == "sgd"
    assert loaded.config.method.directions.distribution == "gaussian"
    assert loaded.sources["optimizer.name"] == "preset mezo"
    assert loaded.sources["method.directions.distribution"] == "preset mezo"


def test_mezo_moves_an_adapter_further() -> None:
    text = VALID.replace("name: vamo", "name: mezo").replace("name: adamw", "name: sgd")
    assert load_text(text).config.method.eps == 1e-3
    assert load_text(text, "model.adapter.type=lora").config.method.eps == 1e-2


def test_a_preset_does_not_hide_a_missing_section() -> None:
    text = VALID.replace("optimizer:\n  name: adamw\n  learning_rate: 1e-3\n", "")
    assert problems_of(text) == [
        "config.yaml: optimizer.learning_rate: required (peak learning rate; it has no default)"
    ]
    assert problems_of(text + "optimizer:\n") == ["config.yaml:13: optimizer: must be a section with keys, not null"]


# Overrides


def test_overrides_make_and_replace_sections() -> None:
    loaded = load_text(
        VALID,
        "model.adapter={type: lora, r: 2}",
        "model.adapter.r=4",
        "schedule.name=cosine",
        "method.snapshot.set.subset=512",
        "method.snapshot.every=1 step",
        "run.name=x",
    )
    assert loaded.config.model.adapter is not None
    assert loaded.config.model.adapter.r == 4
    assert loaded.config.schedule.name == "cosine"
    assert loaded.config.method.snapshot.set.subset == 512
    assert loaded.sources["model.adapter.type"] == "--set"
    assert loaded.sources["run.name"] == "--set"


def test_a_replaced_section_forgets_the_files_lines() -> None:
    loaded = load_text(VALID + "  batch_size: 4\n", "training={steps: 3}")
    assert loaded.config.training.batch_size == 16
    assert loaded.sources["training.batch_size"] == "default"
    assert loaded.sources["training.steps"] == "--set"


def test_an_override_may_mend_the_file() -> None:
    assert problems_of(VALID.replace("steps: 10", "steps: ten")) != []
    assert problems_of(VALID.replace("steps: 10", "steps: ten"), "training.steps=10") == []


def test_a_value_may_hold_an_equals_sign() -> None:
    assert load_text(VALID, "model.path=a=b").config.model.path == "a=b"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("method.probs=4", "--set method.probs: unknown key. Did you mean 'probes'?"),
        ("method.probes=0", "--set method.probes: must be at least 1, not 0"),
        ("method.probes", "--set method.probes: write it as key=value, such as method.probes=4"),
        ("=4", "--set =4: write it as key=value, such as method.probes=4"),
        ("a..b=4", "--set a..b=4: write it as key=value, such as method.probes=4"),
        (
            "method.eps=!!python/name:x 1",
            "--set method.eps: the YAML tag '!!python/name:x' is not allowed; write a plain",
        ),
        ("method.probes=", "--set method.probes: must be a whole number, not null"),
        ("training={batch_size: x, steps: 1}", "--set training.batch_size: must be a whole number, not 'x'"),
    ],
)
def test_bad_overrides(override: str, problem: str) -> None:
    (found,) = problems_of(VALID, override)
    assert found.startswith(problem)


# Files


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "config.yaml: the file is empty; 'vamo-ft init' writes one to start from"),
        (b"# nothing\n", "config.yaml: the file is empty; 'vamo-ft init' writes one to start from"),
        (b"- a\n", "config.yaml: must hold sections such as 'run:' and 'model:' at the top"),
        (b"words\n", "config.yaml: must hold sections such as 'run:' and 'model:' at the top"),
        (b"a: 1\nb: \xff\n", "config.yaml:2: not UTF-8 text; save the file as UTF-8"),
        (b"a: 'x\n", "config.yaml:2: not valid YAML: while scanning a quoted scalar, found unexpected end of stream"),
    ],
)
def test_bad_files(content: bytes, problem: str) -> None:
    Path("config.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(Path("config.yaml"))
    assert str(caught.value) == problem
    assert caught.value.exit_code == 2


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^no\.yaml: no such file; 'vamo-ft init' writes one to start from$"):
        load_config(Path("no.yaml"))
    with pytest.raises(ConfigError, match=r": this is a folder; name the configuration file$"):
        load_config(tmp_path)


def test_byte_order_mark_and_windows_lines() -> None:
    Path("config.yaml").write_bytes(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode())
    assert load_config(Path("config.yaml")).sources["model.path"] == "config.yaml:4"


def test_a_duplicate_key_is_told_with_everything_else() -> None:
    assert problems_of(VALID.replace("  steps: 10", "  steps: 10\n  steps: 20\n  stpes: 1")) == [
        "config.yaml:16: training.steps: duplicate key, first written on line 15",
        "config.yaml:17: training.stpes: unknown key. Did you mean 'steps'?",
    ]
    assert problems_of(VALID.replace("  steps: 10", "  steps: 10\n  steps: 20")) == [
        "config.yaml:16: training.steps: duplicate key, first written on line 15",
    ]
