import json
import logging
from pathlib import Path

import pytest

from vamo_ft.training.sinks import MetricsWriter


def test_one_standard_json_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    record = {"step": 1, "loss": float("nan"), "grad_norm": None, "nested": [float("inf"), {"x": -0.1}], "text": "é\n"}
    with MetricsWriter(path) as writer:
        writer.write(record)
        writer.write({"step": 2})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [
        {"step": 1, "loss": None, "grad_norm": None, "nested": [None, {"x": -0.1}], "text": "é\n"},
        {"step": 2},
    ]


def test_a_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1, "text": "é"})
        assert path.stat().st_size == writer.length == len('{"step": 1, "text": "é"}\n'.encode())


def test_resume_cuts_to_the_recorded_length_and_keeps_the_tail(tmp_path: Path) -> None:
    path, discarded = tmp_path / "metrics.jsonl", tmp_path / "metrics.discarded.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1})
        length = writer.length
        writer.write({"step": 2})
        writer.write({"step": 3})
    with path.open("a") as file:
        file.write('{"step": 4')  # killed within a line
    with MetricsWriter(path) as writer:
        writer.truncate_to(length)
        assert writer.length == length
        writer.write({"step": 2, "again": True})
        writer.truncate_to(writer.length)
    assert path.read_text() == '{"step": 1}\n{"step": 2, "again": true}\n'
    assert discarded.read_text() == '{"step": 2}\n{"step": 3}\n{"step": 4'
    with MetricsWriter(path) as writer:
        writer.truncate_to(0)
    assert path.read_text() == ""
    assert discarded.read_text().endswith('{"step": 1}\n{"step": 2, "again": true}\n')


def test_file_shorter_than_recorded_is_left_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer, caplog.at_level(logging.WARNING, "vamo_ft"):
        writer.write({"step": 1})
        writer.truncate_to(100)
        assert writer.length == 12
    assert "88 bytes shorter" in caplog.text
    assert not (tmp_path / "metrics.discarded.jsonl").exists()


def test_a_file_that_lost_its_end_goes_on_after_its_last_whole_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    for content, kept in ((b'{"step": 1}\n{"st', [1, 3]), (b'{"st', [3]), (b'{"step": 1}\n', [1, 3])):
        path.write_bytes(content)
        with caplog.at_level(logging.WARNING, "vamo_ft"), MetricsWriter(path) as writer:
            writer.truncate_to(100)
            writer.write({"step": 3})
        assert "lines were lost" in caplog.text
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == kept
