import time

import pytest

from vamo_ft.config.yaml_text import parse_yaml, write_yaml, write_yaml_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("1.0e+2", 100.0),
        ("-12", -12),
        ("010", "010"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("no", "no"),
        ("On", "On"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("2001-01-01", "2001-01-01"),
        (".inf", ".inf"),
        ("'1e-3'", "1e-3"),
        ("1e-3 # comment", 0.001),
    ],
)
def test_plain_scalars(text: str, value: object) -> None:
    parsed = parse_yaml(f"key: {text}").values["key"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_lines_of_keys_and_items() -> None:
    document = parse_yaml("a:\n  b: 1\n\n  c:\n  - x\n  - {d: 2}\n0: y\n")
    assert document.values == {"a": {"b": 1, "c": ["x", {"d": 2}]}, 0: "y"}
    assert document.lines == {
        ("a",): 1,
        ("a", "b"): 2,
        ("a", "c"): 4,
        ("a", "c", "0"): 5,
        ("a", "c", "1"): 6,
        ("a", "c", "1", "d"): 6,
        ("0",): 7,
    }


def test_anchors_and_merges() -> None:
    document = parse_yaml("a: &a {x: 1, y: 2}\nb: *a\nc:\n  <<: [{x: 5}, *a]\n  z: 3\nd: {x: 9, <<: *a}\n")
    assert document.problems == []
    assert document.values["b"] == {"x": 1, "y": 2}
    assert document.values["c"] == {"x": 5, "y": 2, "z": 3}
    assert document.values["d"] == {"x": 9, "y": 2}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb:\n  c: 1\n  d: 1\n  c: 2", (5, "b.c: duplicate key, first written on line 3")),
        ("0: a\n'0': b", (2, "0: duplicate key, first written on line 1")),
        (
            "a:\n  b: !!python/object/apply:os.system ['true']",
            (2, "a.b: the YAML tag '!!python/object/apply:os.system' is not allowed; write a plain value"),
        ),
        ("a: !secret x", (1, "a: the YAML tag '!secret' is not allowed; write a plain value")),
        ("a: !!int x", (1, "a: 'x' cannot be read as int")),
        ("a: !!bool maybe", (1, "a: 'maybe' cannot be read as bool")),
        ("? [a]\n: 1", (1, "a key must be a plain word")),
        ("a:\n  <<: 3", (2, "a: '<<' takes a mapping or a list of mappings")),
        ("a: 1\nb: [", (2, "not valid YAML: while parsing a flow node, expected the node content, but found")),
        ("a: 1\n\tb: 2", (2, "not valid YAML: while scanning for the next token, found character '\\t'")),
        ("a: *b", (1, "not valid YAML: found undefined alias 'b'")),
        ("a: 1\n---\nb: 2", (2, "not valid YAML: expected a single document in the stream")),
        ("a: 1\nb: \x07", (2, "the character '\\x07' is not allowed in YAML")),
        ("a: &a [*a]", (1, "nested too deeply")),
        ("[" * 5000, (1, "nested too deeply")),
    ],
)
def test_problems(text: str, problem: tuple[int, str]) -> None:
    (found,) = parse_yaml(text).problems
    assert found[0] == problem[0]
    assert found[1].startswith(problem[1])


def test_aliases_cannot_explode() -> None:
    lines = ["a0: &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0]"]
    lines += [f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(12)]
    start = time.process_time()
    assert parse_yaml("\n".join(lines)).problems[0][1] == "more than 10000 values, aliases included"
    assert time.process_time() - start < 5


def test_written_values_read_back() -> None:
    values = {
        "no": " no",
        "0": ["yes", "1e-3", "010", "1:30", "~", "", "true", "True", ".inf", "2001-01-01", "<<", "a: b", "é\t\x85"],
        "numbers": [1e-5, 1e22, -3, 0.1, True, None],
        "empty": {"list": [], "mapping": {}},
    }
    text = write_yaml(values)
    assert parse_yaml(text).values == values
    for value in values["0"]:
        assert parse_yaml(write_yaml_value(value)).values == value
        assert "\n" not in write_yaml_value(value)
