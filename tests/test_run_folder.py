"""OUT belongs to one config and one process at a time, and to nobody after a kill."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxpref.errors import InputError
from jaxpref.files import LOCK, RUN, RUN_FILES
from jaxpref.runtime import run_folder
from jaxpref.runtime.run_folder import check_config, locked, open_out

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE", 0.0)


def opened(out, reads=None):
    writes, reads = RUN_FILES, reads or {}
    return open_out(str(out), "config.json", what=RUN, writes=writes, reads=reads)


def test_one_at_a_time(tmp_path):
    for _ in range(2):
        with opened(tmp_path) as out:
            assert out == tmp_path
            with pytest.raises(InputError) as error, opened(tmp_path):
                pass
            message = str(error.value)
            assert f"--out {tmp_path}: process {os.getpid()} on " in message
            assert repr(socket.gethostname()) in message
            assert "(since 20" in message and "\n" not in message
        assert (tmp_path / LOCK).read_text() == ""  # it stays, and says nothing


HOLD = """
import os, sys, time
from pathlib import Path
from jaxpref.runtime.run_folder import locked
with locked(Path(sys.argv[1])):
    if os.fork() == 0:  # as a worker would be, which outlives its parent
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_no_lock(tmp_path):
    """Also if a forked child of it lives on; the holder is named while it lives."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(InputError, match=f"process {holder.pid} on "):
            with locked(tmp_path):
                pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(child, 0)  # lives
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.kill()
        holder.wait()


def test_a_lock_that_is_released_a_moment_later(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE", 30.0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(tmp_path))
        threading.Timer(0.3, stack.pop_all().close).start()
        with locked(tmp_path):
            pass


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": "x"}', "\xff" * 9, "null"])
def test_a_holder_that_says_nothing_useful(tmp_path, text):
    with locked(tmp_path):
        (tmp_path / LOCK).write_text(text)
        with pytest.raises(InputError, match="another process is writing to it"):
            with locked(tmp_path):
                pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path), locked(tmp_path):
        assert "has no locks" in caplog.text and str(tmp_path) in caplog.text
    assert not run_folder._held


def link(path):
    path.symlink_to("/etc/passwd")


def read_only(path):
    path.write_text("")
    path.chmod(0o444)


@pytest.mark.parametrize("make", [link, read_only, os.mkfifo, Path.mkdir])
def test_a_lock_that_is_no_file(tmp_path, make):
    make(tmp_path / LOCK)
    with pytest.raises(InputError, match=LOCK):
        with locked(tmp_path):
            pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "export", "report.html", "stopped"])
def test_files_of_others_are_not_overwritten(tmp_path, name):
    """Without a config; but what an earlier start of ours left may be."""
    (tmp_path / "notes.txt").write_text("fine")
    (tmp_path / name).write_text("precious")
    with pytest.raises(InputError, match=f"has {name}, but no config.json of a run"):
        with opened(tmp_path):
            pass
    assert not (tmp_path / LOCK).exists()
    (tmp_path / LOCK).touch()  # an earlier start failed before it wrote anything
    with pytest.raises(InputError, match=f"has {name}"), opened(tmp_path):
        pass
    (tmp_path / "checkpoints").mkdir()
    with opened(tmp_path):
        pass


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ({"a": 1, "b": {"c": 2, "d": 3}}, None),
        ({"a": 1, "b": {"c": 9, "d": 3}}, None),  # may change
        ({"a": 1, "b": {"c": 2, "d": 4}}, r"changed: b.d \(4 -> 3\)\. Use"),
        ({"a": 2, "b": {"c": 2}}, r"changed: a \(2 -> 1\), b.d \(None -> 3\)\."),
        ({"a": 1, "b": {"c": 2, "d": 3}, "e": 0}, r"changed: e \(0 -> None\)"),
        ({"a": 1, "b": {"c": 2, "d": 3}, "f": 1}, None),
        ({"b": {"c": 2, "d": 3}}, "begun by an earlier version, without the option a"),
        ([1], "not the config of a run"),
        ("", "not the config of a run"),
    ],
)
def test_a_config(tmp_path, before, reason):
    path = tmp_path / "config.json"
    path.write_text(before if isinstance(before, str) else json.dumps(before))
    asked = {"a": 1, "b": {"c": 2, "d": 3}, "f": 1}  # f: an option since this version
    check = lambda: check_config(
        tmp_path, path.name, asked, what=RUN, may_change=("b.c", "f")
    )
    if reason is None:
        return check()
    with pytest.raises(InputError, match=reason):
        check()
