"""Errors that were not foreseen, and memory: one line, a log, and a code of its own."""

import os
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.errors import OutOfMemory
from jaxpref.runtime import memory
from jaxpref.runtime.entry import entry_point
from tests.bad_input.spoiled import the_complaint


@pytest.fixture
def ended(capfd, monkeypatch, tmp_path):
    """Exit code and the line on stderr of an entry point in which `error` is raised."""
    monkeypatch.delenv("JAXPREF_DEBUG", raising=False)
    monkeypatch.setattr(memory, "_needed", {})
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def run(error, out=None):
        capfd.readouterr()
        with pytest.raises(SystemExit) as end, entry_point(out):
            error() if callable(error) else _raise(error)
        return end.value.code, the_complaint(capfd.readouterr().err)

    return run


def _raise(error):
    raise error


@pytest.mark.parametrize("number, code", [(5, 1), (107, 1), (28, 2), (13, 2)])
def test_what_may_pass_is_tried_again(ended, number, code):
    """The supervisor restarts after code 1, and not after 2."""
    found, line = ended(OSError(number, os.strerror(number), "bucket/file"))
    assert found == code
    assert f"bucket/file: {os.strerror(number)}" in line


@pytest.mark.parametrize("code, passed_on", [(2, 2), (66, 66), (-9, 1)])
def test_a_command_that_failed_has_said_why(ended, code, passed_on):
    """Of a signal, which has a negative code, the supervisor tries again."""
    error = subprocess.CalledProcessError(code, ["jaxpref", "train", "--out", "a b"])
    found, line = ended(error)
    assert found == passed_on
    assert line == "jaxpref: error: the command failed: jaxpref train --out 'a b'"


UNFORESEEN = {
    "ZeroDivisionError: division by zero": lambda: 1 / 0,
    "KeyError: 'x'": lambda: {}["x"],
    "AssertionError: AssertionError": lambda: _raise(AssertionError()),
    "RecursionError: maximum recursion": lambda: _forever(),
    "TypeError: first": lambda: _raise(TypeError("first\nsecond\nthird")),
    "RuntimeError: UNAVAILABLE: peer": lambda: _raise(
        jax.errors.JaxRuntimeError("UNAVAILABLE: peer has died")
    ),
    "UnicodeEncodeError: 'utf-8' codec": lambda: "\udcff".encode(),
    "OverflowError: ": lambda: np.zeros(3, np.int32).__setitem__(0, 2**40),
    "RuntimeError: RESOURCE_EXHAUSTED: Received message larger": lambda: _raise(
        jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Received message larger than max (5 vs. 4)"
        )
    ),
}


def _forever():
    return _forever()


@pytest.mark.parametrize("what", UNFORESEEN)
def test_an_unforeseen_error_is_one_line_and_a_log(ended, tmp_path, what):
    code, line = ended(UNFORESEEN[what])
    assert code == 1  # a supervisor tries again
    assert line.startswith("jaxpref: error: unexpected "), line
    assert what.split(": ", 1)[1] in line, line
    (log,) = (tmp_path / "temporary").iterdir()
    assert str(log) in line and log.stat().st_mode & 0o777 == 0o600
    text = log.read_text()
    assert text.startswith("Traceback") and what.split(":")[0] in text


def test_the_log_lies_in_the_folder_of_a_run(ended, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    code, line = ended(KeyError("x"), out)  # some other folder: nothing is put there
    assert not list(out.iterdir()) and str(tmp_path / "temporary") in line
    (out / "config.json").write_text("{}")
    for _ in range(2):
        code, line = ended(KeyError("x"), out)
        assert str(out / "jaxpref-error-") in line
    assert len(list(out.glob("*.log"))) == 2


def test_without_a_place_for_the_log(ended, monkeypatch):
    with monkeypatch.context() as patch:  # pytest needs the folder too
        patch.setattr(tempfile, "tempdir", "/nowhere")
        code, line = ended(KeyError("x"))
    assert code == 1 and "JAXPREF_DEBUG=1 shows the traceback" in line


def test_a_debugger_sees_the_traceback(monkeypatch, capfd):
    monkeypatch.setenv("JAXPREF_DEBUG", "1")
    with pytest.raises(SystemExit), entry_point():
        {}["x"]
    err = capfd.readouterr().err
    assert "Traceback" in err and "jaxpref: error: unexpected KeyError" in err


MEMORY = {
    "host": lambda: np.zeros(2**50),
    "host, of Python": lambda: bytearray(2**60),
    "device": lambda: jnp.zeros(2**45).block_until_ready(),
    "compiler of TPUs": lambda: _raise(
        jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
            "memory space hbm. Used 21.40G of 15.75G hbm."
        )
    ),
    "GPU": lambda: _raise(
        ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")
    ),
    "loading a program": lambda: _raise(
        jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Error loading program: Attempting to reserve 9.27G at "
            "the bottom of memory."
        )
    ),
}
OPTIONS = ("--batch-size", "--accumulation", "--remat", "--row-length")


@pytest.mark.parametrize("where", MEMORY)
def test_out_of_memory(ended, tmp_path, where):
    memory._needed |= {"a step": 3 * 2**30}
    code, line = ended(MEMORY[where])
    assert code == 66
    assert line.startswith("jaxpref: error: out of memory ("), line
    assert "a step needs 3,072 MiB per device, which has" in line, line
    assert all(option in line for option in OPTIONS), line
    assert not list((tmp_path / "temporary").iterdir())  # foreseen


def test_a_step_that_does_not_fit_has_the_same_code(ended, monkeypatch):
    monkeypatch.setattr(memory, "memory_limit", lambda: 2**30)
    code, line = ended(lambda: memory.check_memory(3 * 2**30))
    assert code == 66 and all(option in line for option in OPTIONS)
    assert "a step needs 3,072 MiB of memory per device, which has 1,024 MiB" in line


def test_arrays_are_checked_by_their_shapes(monkeypatch):
    monkeypatch.setattr(memory, "memory_limit", lambda: 2**30)
    types = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((8,), ("data",), axis_types=types)
    sharded = jax.NamedSharding(mesh, jax.P("data"))

    def array(rows, dtype, sharding=None):
        return jax.ShapeDtypeStruct((rows, 2**20), dtype, sharding=sharding)

    memory.check_arrays("model: the weights", {"a": array(256, jnp.float32)})
    memory.check_arrays("model: the weights", [array(512, jnp.bfloat16)])
    memory.check_arrays("model: the weights", array(2048, jnp.float32, sharded))
    for rows, dtype, sharding in (
        (257, jnp.float32, None),
        (2056, jnp.float32, sharded),
        (10**12, jnp.int8, None),
    ):
        with pytest.raises(OutOfMemory, match="model: the weights need [0-9,]+ MiB"):
            memory.check_arrays("model: the weights", array(rows, dtype, sharding))


def test_weights_larger_than_the_memory_are_not_read(inputs, refuse, monkeypatch):
    monkeypatch.setattr(memory, "memory_limit", lambda: 1000)
    given = ["--model", inputs.model, "--data", inputs.data, "--out", inputs.out]
    line = refuse(["evaluate", *map(str, given)], f"{inputs.model}: the weights need")
    assert "--mesh.fsdp" in line
    assert not Path(inputs.out / "metrics.json").exists()
