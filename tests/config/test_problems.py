"""The table of bad configurations, each with all that is said of it."""

import pytest

from tests.config.examples import VALID, problems_of
from vamo_ft.config.method import METHOD_NAMES

METHODS = f"{', '.join(map(repr, METHOD_NAMES[:-1]))} or {METHOD_NAMES[-1]!r}"
CLASSIFICATION = 'type: classification\n    template: "{x}"\n    '
TRAINING_KEYS = (
    "steps, epochs, batch_size, micro_batch_size, max_grad_norm, autocast, activation_checkpointing, stream_layers, "
    "forward_batch_tokens, max_seconds, fsdp, check_processes_every, on_divergence, rollbacks"
)


# (what is replaced in the valid file, by what, what is said)
CASES: list[tuple[str, str, list[str]]] = [
    # what is refused with its reason
    (
        "path: some/model",
        "path: some/model\n  dtype: float16",
        [
            "5: model.dtype: float16 weights are for inference: updates and probe points need the range of bfloat16 or "
            "float32"
        ],
    ),
    # unknown keys
    ("name: vamo", "name: vamo\n  probs: 4", ["11: method.probs: unknown key. Did you mean 'probes'?"]),
    (
        "steps: 10",
        "steps: 10\n  learning_rate: 1",
        ["16: training.learning_rate: unknown key. 'learning_rate' is a key of optimizer"],
    ),
    ("steps: 10", "steps: 10\n  colour: 1", [f"16: training.colour: unknown key. The keys here are {TRAINING_KEYS}"]),
    (
        "steps: 10",
        "steps: 10\n  eps: 1",
        ["16: training.eps: unknown key. Did you mean 'steps'? 'eps' is a key of method and optimizer"],
    ),
    ("name: vamo", "name: adamw\n  source: table", ["11: method.source: unknown key here; it belongs to name: vamo"]),
    (
        "name: vamo",
        "name: first_order\n  eps: 1",
        [
            "11: method.eps: unknown key here; it belongs to name: spsa, mezo, mezo_bcd, lozo, subzero, sparse_mezo, "
            "zo_adam, zo_sign, zo_momentum, vamo, zo_svrg, mezo_svrg or addax"
        ],
    ),
    ("run:", "runs: 1\nrun:", ["1: runs: unknown key. Did you mean 'run'?"]),
    ("name: demo", "name: demo\n  1: 2", ["3: run.1: unknown key. The keys here are name, output_dir, seed, offline"]),
    (
        "name: vamo",
        "name: vamo\n  snapshot:\n    set: {sub: 1}",
        [
            "12: method.snapshot.set.subset: required (samples whose mean stands for the mean over all; at least "
            "8 * every * batch)",
            "12: method.snapshot.set.sub: unknown key. Did you mean 'subset'?",
        ],
    ),
    # choices
    ("name: vamo", "name: vmao", [f"10: method.name: must be {METHODS}, not 'vmao'. Did you mean 'vamo'?"]),
    ("name: vamo", "name: [vamo]", [f'10: method.name: must be {METHODS}, not ["vamo"]']),
    ("name: vamo", "probes: 3", [f"9: method.name: required: {METHODS}"]),
    (
        "type: prompt_completion",
        "type: clasification",
        [
            "8: data.format.type: must be 'classification', 'prompt_completion', 'chat', 'text' or 'task', not "
            "'clasification'. Did you mean 'classification'?"
        ],
    ),
    (
        "steps: 10",
        "steps: 10\n  autocast: float16",
        ["16: training.autocast: must be 'bfloat16', not 'float16'. Did you mean 'bfloat16'?"],
    ),
    (
        "steps: 10",
        "steps: 10\nevaluation:\n  metrics:\n  - loss\n  - acuracy",
        [
            "19: evaluation.metrics.1: must be 'loss', 'perplexity', 'accuracy', 'exact_match', 'f1' or 'rouge_l', not "
            "'acuracy'. Did you mean "
            "'accuracy'?"
        ],
    ),
    (
        "steps: 10",
        "steps: 10\n  micro_batch_size: all",
        ["16: training.micro_batch_size: must be 'auto' or a whole number, not 'all'"],
    ),
    (
        "steps: 10",
        "steps: 10\n  micro_batch_size: 0",
        ["16: training.micro_batch_size: must be 'auto' or above 0, not 0"],
    ),
    (
        "steps: 10",
        "steps: 10\n  on_divergence: roll_back",
        ["16: training.on_divergence: must be 'stop' or 'rollback', not 'roll_back'. Did you mean 'rollback'?"],
    ),
    (
        "steps: 10",
        "steps: 10\n  rollbacks: 5",
        ["16: training.rollbacks: none are made; add on_divergence: rollback, or leave it out"],
    ),
    # missing keys
    ("  steps: 10", "  batch_size: 10", ["14: training: write exactly one of steps and epochs"]),
    ("steps: 10", "steps: 10\n  epochs: 1", ["14: training: write exactly one of steps and epochs"]),
    (
        "  learning_rate: 1e-3\n",
        "",
        ["11: optimizer.learning_rate: required (peak learning rate; it has no default)"],
    ),
    ("run:\n  name: demo\n", "", [": run: required section with name"]),
    ("method:\n  name: vamo\n", "", [": method: required section with name"]),
    # types
    ("steps: 10", "steps: ten", ["15: training.steps: must be a whole number, not 'ten'"]),
    ("steps: 10", "steps: 1.5", ["15: training.steps: must be a whole number, not 1.5"]),
    ("steps: 10", "steps: true", ["15: training.steps: must be a whole number, not true"]),
    ("steps: 10", "steps: '10'", ["15: training.steps: must be a whole number, not '10'"]),
    ("1e-3", "fast", ["13: optimizer.learning_rate: must be a number, not 'fast'"]),
    ("1e-3", "1e999", ["13: optimizer.learning_rate: must be a finite number, not Infinity"]),
    ("1e-3", "", ["13: optimizer.learning_rate: must be a number, not null"]),
    ("name: demo", "name: demo\n  offline: yes", ["3: run.offline: must be true or false, not 'yes'"]),
    ("name: demo", "name: 7", ["2: run.name: must be text, not 7; put it in quotes"]),
    ("path: some/model", "path: ''", ["4: model.path: must be text that is not empty, not ''"]),
    ("path: some/model", "path: m\n  freeze: '*'", ["5: model.freeze: must be a list, not '*'"]),
    ("path: some/model", "path: m\n  adapter: lora", ["5: model.adapter: must be a section with keys, not 'lora'"]),
    ("method:\n  name: vamo", "method: vamo", ["9: method: must be a section with keys, not 'vamo'"]),
    (
        "path: some/model",
        "path: m\n  adapter: {type: lora, target_modules: 3}",
        ["5: model.adapter.target_modules: must be 'all-linear' or a list, not 3"],
    ),
    (
        "path: some/model",
        "path: m\n  adapter: {type: lora, target_modules: [q, 3]}",
        ["5: model.adapter.target_modules.1: must be text, not 3; put it in quotes"],
    ),
    (
        "type: prompt_completion",
        CLASSIFICATION + "labels: [a, b]",
        ['10: data.format.labels: must be a mapping, not ["a", "b"]'],
    ),
    (
        "type: prompt_completion",
        CLASSIFICATION + "labels: {a: 0, b: x}",
        ["10: data.format.labels.a: must be text, not 0; put it in quotes"],
    ),
    # ranges
    ("steps: 10", "steps: 0", ["15: training.steps: must be above 0, not 0"]),
    ("name: vamo", "name: vamo\n  probes: 0", ["11: method.probes: must be at least 1, not 0"]),
    ("name: vamo", "name: vamo\n  eps: -1", ["11: method.eps: must be 'auto' or above 0, not -1"]),
    (
        "name: vamo",
        "name: vamo\n  eps: aut",
        ["11: method.eps: must be 'auto' or a number, not 'aut'. Did you mean 'auto'?"],
    ),
    ("1e-3", "1e-3\n  betas: [0.9, 1]", ["14: optimizer.betas.1: must be below 1, not 1"]),
    ("1e-3", "1e-3\n  betas: [0.9]", ["14: optimizer.betas: must have 2 values, not 1"]),
    ("1e-3", "1e-3\n  betas: [0.9, 0.9, 0.9]", ["14: optimizer.betas: must have 2 values, not 3"]),
    ("name: demo", f"name: demo\n  seed: {2**63}", [f"3: run.seed: must be below {2**63}, not {2**63}"]),
    (
        "type: prompt_completion",
        CLASSIFICATION + "labels: {a: x}",
        ["10: data.format.labels: must have at least 2 entries, not 1"],
    ),
    (
        "steps: 10",
        "steps: 10\nevaluation: {metrics: []}",
        ["16: evaluation.metrics: must have at least 1 entry, not 0"],
    ),
    (
        "steps: 10",
        "steps: 10\nlogging: {every: 10}",
        ["16: logging.every: must be a whole number above 0 and a unit, such as '200 steps', not 10"],
    ),
    (
        "steps: 10",
        "steps: 10\nlogging: {trackers: [tensorbord]}",
        [
            "16: logging.trackers.0: must be 'tensorboard', 'wandb', 'mlflow' or 'trackio', not 'tensorbord'. Did you "
            "mean 'tensorboard'?"
        ],
    ),
    (
        "steps: 10",
        "steps: 10\nlogging: {trackers: [wandb, wandb]}",
        ["16: logging.trackers: names a tracker twice"],
    ),
    (
        "steps: 10",
        "steps: 10\nlogging: {trackers: [tensorboard], project: x}",
        ["16: logging.project: only wandb, mlflow and trackio have one; add one to trackers, or leave it out"],
    ),
    (
        "name: demo",
        "name: ../demo",
        ["2: run.name: must be letters, digits, '.', '_' and '-', a letter or digit first, not '../demo'"],
    ),
    # rules over several keys
    ("1e-3", "1e-3\n  momentum: 0.9", ["14: optimizer.momentum: adamw has no such setting (sgd only)"]),
    (
        "name: vamo",
        "name: vamo\n  snapshot: {set: {subset: 9}}",
        ["11: method.snapshot.every: a snapshot over a subset needs its period in steps, such as '16 steps'"],
    ),
    (
        "name: vamo",
        "name: vamo\n  snapshot: {every: 4 steps, set: {subset: 9}}",
        [
            "11: method.snapshot.set.subset: 9 is below 512 = 8 * every * training.batch_size; a smaller set mostly "
            "corrects towards the steps it is about to score"
        ],
    ),
    (
        "name: vamo",
        "name: sgd",
        ["12: optimizer.name: adamw contradicts method.name: sgd; leave it out, or write method.name: first_order"],
    ),
    (
        "type: prompt_completion",
        CLASSIFICATION + "labels: {a: x, b: x}",
        ["10: data.format.labels: two labels have the same text and could not be told apart"],
    ),
    (
        "steps: 10",
        "steps: 10\nevaluation: {metrics: [accuracy]}",
        ["16: evaluation.metrics: accuracy needs data.format.type: classification, or a task with options"],
    ),
]


@pytest.mark.parametrize(("old", "new", "said"), CASES, ids=[new.strip().replace("\n", " ") for _, new, _ in CASES])
def test_bad_configurations(old: str, new: str, said: list[str]) -> None:
    assert old in VALID
    text = VALID.replace(old, new, 1)
    assert problems_of(text) == [f"config.yaml{'' if line.startswith(':') else ':'}{line}" for line in said]


def test_all_problems_at_once_in_the_order_of_lines() -> None:
    text = VALID.replace("name: demo", "nam: demo").replace("1e-3", "-1").replace("steps: 10", "step: 10")
    assert problems_of(text, "logging.every=x", "nothing.here=1") == [
        "config.yaml:1: run.name: required (name of the run's directory under output_dir)",
        "config.yaml:2: run.nam: unknown key. Did you mean 'name'?",
        "config.yaml:13: optimizer.learning_rate: must be above 0, not -1",
        "config.yaml:15: training.step: unknown key. Did you mean 'steps'?",
        "--set logging.every: must be a whole number above 0 and a unit, such as '200 steps', not 'x'",
        "--set nothing: unknown key. The keys here are run, model, data, method, objective, optimizer, schedule, "
        "training, evaluation, checkpoint, logging, compare",
    ]


def test_problems_are_single_lines_without_pydantic() -> None:
    for old, new, _ in CASES:
        for line in problems_of(VALID.replace(old, new, 1)):
            assert "\n" not in line
            assert "Input" not in line and "pydantic" not in line
