"""Outputs: no input, device, link or other run is overwritten, whatever its name."""

import contextlib
import json
import logging
import os
import socket
import stat
from pathlib import Path

import pytest

from jaxpref import files
from jaxpref.errors import InputError
from jaxpref.files import (
    check_output,
    check_output_folder,
    kind_of,
    open_to_append,
    write_json,
    write_whole,
)
from jaxpref.runtime.cache_folder import make_private, warn_if_others_write

PRECIOUS = "precious\n"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """One thing of each kind, seen from inside the folder."""
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(PRECIOUS)
    os.link("data.jsonl", "hard link.jsonl")
    Path("link.jsonl").symlink_to("data.jsonl")
    Path("dangling").symlink_to("nowhere")
    Path("to a device").symlink_to("/dev/null")
    os.mkfifo("fifo")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind("socket")
    Path("read-only").write_text(PRECIOUS)
    Path("read-only").chmod(0o444)
    for name in ("model", "run", "audit", "set", "plain"):
        Path(name).mkdir()
    Path("model/config.json").write_text('{"model_type": "llama"}')
    Path("model/model.safetensors").write_text(PRECIOUS)
    Path("run/config.json").write_text('{"loss": {"name": "dpo"}}')
    Path("run/metrics.jsonl").write_text(PRECIOUS)
    Path("run/export").mkdir()
    Path("run/export/config.json").write_text('{"architectures": ["X"]}')
    Path("audit/audit_config.json").write_text("{}")
    Path("audit/clean.jsonl").write_text(PRECIOUS)
    Path("set/dataset_info.json").write_text("{}")
    Path("also a set").symlink_to("set")
    Path("also a model").symlink_to("model")
    return tmp_path


def contents(folder: Path) -> dict[str, tuple]:
    """Type, mode and content of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = os.lstat(path).st_mode
        what = path.read_bytes() if stat.S_ISREG(mode) else b""
        found[str(path)] = mode, what, os.readlink(path) if path.is_symlink() else None
    return found


NOT_A_FILE = {
    "plain": "is a folder",
    "": "is a folder",
    "/": "is a folder",
    "..": "is a folder",
    "link.jsonl": "is a symbolic link to data.jsonl",
    "dangling": "is a symbolic link to nowhere",
    "to a device": "is a symbolic link to /dev/null",
    "also a set": "is a symbolic link to set",
    "fifo": "a pipe",
    "socket": "a socket",
    "/dev/null": "is a device",
    "/dev/zero": "is a device",
    "/dev/stdout": "is a symbolic link",
    "/dev/fd/1": "is a symbolic link",
    "/proc/self/fd/1": "is a symbolic link",
    "read-only": "is read-only",
    "data.jsonl/x": "cannot be written",
    "a\0b": "cannot be written",
    "x" * 300: "cannot be written",
}


@pytest.mark.parametrize("write", [write_whole, check_output, open_to_append])
@pytest.mark.parametrize("name", NOT_A_FILE)
def test_what_is_not_a_file_is_refused(folder, name, write):
    before = contents(folder)
    arguments = {
        write_whole: (name, "new"),
        check_output: ("--out", name, {}),
        open_to_append: (Path(name),),
    }[write]
    with pytest.raises(InputError) as error:
        write(*arguments)
    assert NOT_A_FILE[name] in str(error.value) and "\n" not in str(error.value)
    assert contents(folder) == before


def test_a_name_that_ends_like_a_folder(folder):
    with pytest.raises(InputError, match=r"--json new/: is a folder"):
        check_output("--json", "new/", {})


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755, 0o666])
def test_an_existing_file_keeps_its_mode(folder, mode):
    path = folder / "data.jsonl"
    path.chmod(mode)
    write_json(path, [1])
    assert json.loads(path.read_text()) == [1]
    assert stat.S_IMODE(path.stat().st_mode) == mode
    # Written beside and renamed: another name of the old file still has the old text.
    assert (folder / "hard link.jsonl").read_text() == PRECIOUS


def test_setuid_is_not_kept(folder):
    path = folder / "data.jsonl"
    path.chmod(0o4755)
    write_whole(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_new_file_has_the_mode_of_the_umask(folder, mask, mode):
    before = os.umask(mask)
    try:
        write_whole(folder / "new", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "new").stat().st_mode) == mode


def test_a_planted_temporary_name_is_not_followed(folder, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "guessed")
    (folder / ".guessed.partial").symlink_to(folder / "data.jsonl")
    with pytest.raises(InputError, match="new: cannot be written"):
        write_whole(folder / "new", "new")
    assert (folder / "data.jsonl").read_text() == PRECIOUS
    assert not (folder / "new").exists()


def test_an_interrupt_leaves_nothing(folder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = contents(folder)
    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(folder / "data.jsonl", "new")
    assert contents(folder) == before


# Output, what the command reads, and the reason for refusing it (None if it is fine).
OUTPUTS = [
    ("data.jsonl", {"--data": "data.jsonl"}, "is part of --data data.jsonl"),
    ("./plain/../data.jsonl", {"--data": "data.jsonl"}, "is part of --data"),
    ("hard link.jsonl", {"--data": "data.jsonl"}, "is part of --data"),
    ("data.jsonl", {"--data": "link.jsonl"}, "is part of --data link.jsonl"),
    ("model/x.json", {"--model": "model"}, "is part of --model"),
    ("model/x.json", {"--model": "also a model"}, "is part of --model"),
    ("also a model/config.json", {"--model": "model"}, "is part of --model"),
    ("set/x", {"--data": "set?split=train"}, "is part of --data"),
    ("model/config.json", {}, "is in the folder of a model"),
    ("model/new.json", {}, "is in the folder of a model"),
    ("set/new.json", {}, "is in the folder of a dataset"),
    ("run/metrics.jsonl", {}, "is part of a run"),
    ("run/report.html", {}, "is part of a run"),
    ("run/checkpoints/2/state/x", {}, "is part of a run"),
    ("run/export/samples.json", {}, "is in the folder of a model"),
    ("audit/clean.jsonl", {}, "is part of an audit"),
    ("audit/features/x.npz", {}, "is part of an audit"),
    ("plain/new.json", {"--data": "data.jsonl", "--model": "model"}, None),
    ("plain/deep/new.json", {"--reference": None}, None),
    ("run/samples.json", {"--model": "run/export"}, None),
    ("run/samples.json", {"--model": "model"}, "is in the folder of a run that"),
    ("audit/samples.json", {"--model": "run/export"}, "is in the folder of an audit"),
    ("audit/samples.json", {"--data": "audit/clean.jsonl"}, None),
    ("data.jsonl", {"--data": "hf:OWNER/NAME", "--model": "owner/name"}, None),
    ("new.json", {"--data": "x" * 5000}, None),
]


@pytest.mark.parametrize(("output", "reads", "reason"), OUTPUTS)
def test_an_output_file(folder, output, reads, reason):
    before = contents(folder)
    if reason is None:
        check_output("--out", output, reads)
        write_whole(output, "new")
        assert Path(output).read_text() == "new"
        return
    with pytest.raises(InputError, match=reason) as error:
        check_output("--out", output, reads)
    assert str(error.value).startswith(f"--out {output}: ")
    assert contents(folder) == before


WRITES = ("config.json", "metrics.jsonl", "clean.jsonl", "export", "checkpoints")
FOLDERS = [
    ("data.jsonl", {}, "cannot be used"),
    ("/dev/null/out", {}, "cannot be used"),
    ("a\0b", {}, "cannot be used"),
    ("x" * 300, {}, "cannot be used"),
    ("gs://bucket/run", {}, "mount"),
    ("s3://bucket/run", {}, "mount"),
    ("model", {}, "holds a model"),
    ("also a model", {}, "holds a model"),
    ("set", {}, "holds a dataset"),
    ("audit", {}, "holds an audit"),
    ("plain", {"--data": "plain"}, "is --data plain"),
    ("run/export", {}, "holds a model"),
    ("run/export/run", {}, "is part of a run"),
    ("run/reference/run", {}, "is part of a run"),
    ("run", {"--model": "run/export"}, "overwrite export in it, and reads --model"),
    ("run", {"--data": "run/metrics.jsonl"}, "overwrite metrics.jsonl"),
    ("audit", {"--data": "audit/clean.jsonl"}, "holds an audit"),
    (".", {"--data": "clean.jsonl"}, "overwrite clean.jsonl"),
    ("linked", {}, "export in it is a symbolic link"),
    ("piped", {}, "metrics.jsonl in it is a device, a pipe"),
    ("run", {"--data": "data.jsonl", "--model": "model"}, None),
    ("run/again", {"--model": "run/export"}, None),
    ("model/run", {"--model": "model"}, None),
    ("new/folder", {"--model": "hub/id"}, None),
    ("to a folder", {}, None),
]


@pytest.mark.parametrize(("output", "reads", "reason"), FOLDERS)
def test_an_output_folder(folder, output, reads, reason):
    Path("linked").mkdir()
    Path("linked/export").symlink_to("../model")
    Path("piped").mkdir()
    os.mkfifo("piped/metrics.jsonl")  # reading it would never end
    Path("to a folder").symlink_to("plain")  # such as a larger disk
    os.link("data.jsonl", "clean.jsonl")
    before = contents(folder)
    check = lambda: check_output_folder("--out", output, WRITES, reads, what=files.RUN)
    if reason is None:
        assert check() == Path(output) and Path(output).is_dir()
        return
    with pytest.raises(InputError, match=reason) as error:
        check()
    assert str(error.value).startswith(f"--out {output}: ")
    assert contents(folder) == before


def test_kinds_of_folders(folder):
    Path("begun/checkpoints").mkdir(parents=True)  # no step is done yet
    Path("begun/.lock").touch()
    kinds = {"run": "a run", "begun": "a run", "audit": "an audit", "model": "a model"}
    kinds |= {
        "set": "a dataset",
        "plain": None,
        "nowhere": None,
        "run/export": "a model",
    }
    assert {name: kind_of(Path(name)) for name in kinds} == kinds
    for text in ("{", "[]", "{}", "[" * 100_000):
        Path("plain/config.json").write_text(text)
        assert kind_of(Path("plain")) is None


@pytest.mark.parametrize(
    ("mode", "who"),
    [(0o777, "everyone"), (0o702, "everyone"), (0o770, "its group"), (0o755, None)],
)
def test_a_cache_that_others_can_write_to(tmp_path, caplog, mode, who):
    shared = tmp_path / "cache"
    shared.mkdir()
    shared.chmod(mode)
    for _ in range(2):
        warn_if_others_write(shared, holds="the scores")
    found = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]
    assert len(found) == (who is not None)
    if who is not None:
        assert f"{shared}: can be written by {who}" in found[0]
        assert "the scores" in found[0] and "chmod" in found[0]


def test_a_cache_of_another_user(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    if not tmp_path.stat().st_uid:
        os.chown(tmp_path, 12345, -1)
    warn_if_others_write(tmp_path, holds="the scores")
    assert "belongs to user" in caplog.text


def test_folders_of_the_cache_belong_to_one_user(tmp_path):
    before = os.umask(0)
    try:
        make_private(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755
