"""A metrics.jsonl with lines that are not metrics: the good ones stay."""

import json

import pytest

from jaxpref.runtime.metrics_file import MetricsWriter, read_metrics

GOOD = [{"step": step, "loss": 0.5, "grad_norm": None} for step in range(1, 5)]
DAMAGED = {
    "cut in the middle": b'{"step": 2, "lo',
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "a string": b'"step"',
    "no step": b'{"loss": 1.0}',
    "a step that is text": b'{"step": "2", "loss": 1.0}',
    "a step that is true": b'{"step": true, "loss": 1.0}',
    "a step that is a fraction": b'{"step": 1.5, "loss": 1.0}',
    "a value that is text": b'{"step": 2, "loss": "low"}',
    "a value that is a list": b'{"step": 2, "loss": [1]}',
    "not UTF-8": b'{"step": 2, "l\xff": }',
    "NUL bytes, as after a power failure": b"\0" * 100,
    "endless nesting": b"[" * 100_000,
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_damaged_line_takes_no_other_with_it(tmp_path, caplog, name, at):
    lines = [json.dumps(line).encode() for line in GOOD]
    lines.insert(at, DAMAGED[name])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert read_metrics(path) == GOOD
    MetricsWriter(tmp_path, resumed_at=3).close()
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept == GOOD[:3]
    assert f"dropped damaged lines: {at + 1}" in caplog.text


def test_the_last_line_of_a_killed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in GOOD) + '{"step": 5')
    assert read_metrics(path) == GOOD
