import pytest

from vamo_ft.config.compare import meaning_changes

OLD = {
    "run": {"name": "a", "seed": 1},
    "data": {"train": {"path": "x"}, "evaluation": None},
    "training": {"steps": 10, "batch_size": 8},
    "evaluation": {"every": None},
    "checkpoint": {"every": None, "keep": 2},
    "logging": {"every": "10 steps"},
}


@pytest.mark.parametrize(
    ("section", "changes", "expected"),
    [
        ("training", {"steps": 20}, []),
        ("training", {"micro_batch_size": 2, "forward_batch_tokens": 64, "activation_checkpointing": True}, []),
        ("training", {"micro_batch_size": "auto", "on_divergence": "rollback", "rollbacks": 5}, []),
        ("training", {"max_seconds": 60.0, "epochs": 2.0}, []),
        ("run", {"name": "b"}, []),
        ("checkpoint", {"keep": 5, "every": "3 steps", "on_error": "continue"}, []),
        ("logging", {"every": "1 step"}, []),
        ("data", {"evaluation": {"path": "y", "limit": 3}}, []),
        ("evaluation", {"every": "2 steps"}, []),
        ("training", {"batch_size": 4, "steps": 20}, ["training.batch_size: 8 -> 4"]),
        ("run", {"seed": 2}, ["run.seed: 1 -> 2"]),
        ("data", {"train": {"path": "z"}}, ["data.train.path: 'x' -> 'z'"]),
        ("data", {"evaluationx": 1}, ["data.evaluationx: None -> 1"]),
    ],
)
def test_only_keys_that_change_the_meaning_are_named(section, changes, expected):
    assert meaning_changes(OLD, {**OLD, section: {**OLD[section], **changes}}) == expected
    assert meaning_changes(OLD, OLD) == []
