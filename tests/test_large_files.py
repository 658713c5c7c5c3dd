"""Records tokenized in chunks: in processes, from the cache, and shared by a run.

The datasets are those of the version that read all records one by one; their digests
were computed with it.
"""

import dataclasses
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxpref.data import (
    DataOptions,
    InjectOptions,
    Kind,
    chunk_pool,
    make_splits,
    open_records,
)
from jaxpref.data import chunk as chunks
from jaxpref.data.array_file import Damaged, pack, unpack
from jaxpref.data.records import expand
from jaxpref.data.sources import divisible
from jaxpref.errors import InputError
from jaxpref.runtime import cache_folder
from tests.data_tokenizers import CHATML, byte_tokenizer
from tests.tiny import padded_batches
from tests.virtual import xla_flags

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = byte_tokenizer()
OPTIONS = DataOptions(
    heldout_fraction=0.25,
    max_length=48,
    on_bad_row="skip",
    drop_empty=True,
    inject=InjectOptions(flip_rate=0.3, seed=5),
)
WITHOUT_NOISE = OPTIONS.without_injection()
BEFORE = {
    "noise": ("01103fc37d26f134", "80e3f41a451c50ba"),
    "limit": ("cee3105e52aa8b97", "7162fad9ae21cd89"),
}
"""The first digits of the dataset's digest and of the SHA-256 of its ids."""


def records():
    """Copies, shared prompts, annotators, known flips, empty and malformed rows."""
    rows = []
    for n in range(100):
        row = {
            "prompt": f"question {n % 23} " + "abc " * (n % 13),
            "chosen": f" good {n % 31}",
            "rejected": f" bad {n % 17}" + " x" * (n % 7),
            "annotator": [None, "w2", "w1", 7][n % 4],
        }
        rows.append(row | ({"flip": True} if n % 11 == 3 else {}))
    rows[40], rows[73] = dict(rows[5]), dict(rows[5])
    rows[21]["chosen"] = ""
    rows[33]["rejected"] = rows[33]["chosen"]
    rows[50], rows[77] = "not a record", {"prompt": "p", "chosen": 3, "rejected": "r"}
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def opened(path, options=OPTIONS):
    return open_records(path, options, sides=2)


def summary(splits):
    ids = [name for part in (splits.train, splits.heldout) for name in part.ids]
    return splits.digest[:16], hashlib.sha256(" ".join(ids).encode()).hexdigest()[:16]


@pytest.fixture
def small(monkeypatch):
    """Chunks of eight rows; counts how many are tokenized in this process."""
    made = []

    def counted(source, *rest, read=chunks.read_chunk):
        made.append(source.row_location(0))
        return read(source, *rest)

    monkeypatch.setattr(chunks, "ROWS", 8)
    monkeypatch.setattr(chunk_pool, "CHUNKS_PER_PROCESS", 1000)
    monkeypatch.setattr(chunk_pool, "read_chunk", counted)
    return made


@pytest.mark.parametrize("name", BEFORE)
def test_the_same_dataset_as_before(tmp_path, small, name):
    path = write(tmp_path / "pairs.jsonl", records())
    options = OPTIONS
    if name == "limit":
        options = dataclasses.replace(WITHOUT_NOISE, max_pairs=30)
    for folder in (None, tmp_path / "tokens", tmp_path / "tokens"):
        splits = make_splits(opened(path), TOKENIZER, options, folder=folder)
        assert summary(splits) == BEFORE[name]
    skipped = [bad.row.removeprefix(f"{tmp_path}/") for bad in splits.skipped]
    if name == "limit":
        assert len(splits.train) + len(splits.heldout) == 30 and not skipped
        return
    # Thirteen chunks without a cache, thirteen to fill it, and none from it.
    assert len(small) == 26 and small[1] == f"{path} row 9"
    assert skipped == ["pairs.jsonl row 51", "pairs.jsonl row 78"]
    assert splits.report["rows"] == 100 and splits.report["skipped"] == 2
    assert splits.fields.describe().endswith("format: pairs 96")


def test_processes_make_the_same_batches(tmp_path, small, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(chunk_pool, "CHUNKS_PER_PROCESS", 6)
    path = write(tmp_path / "pairs.jsonl", records())
    splits = make_splits(opened(path), TOKENIZER, OPTIONS, folder=tmp_path / "tokens")
    assert not small and summary(splits) == BEFORE["noise"]
    cached = make_splits(opened(path), TOKENIZER, OPTIONS, folder=tmp_path / "tokens")
    assert not small
    one, other = (next(padded_batches(x.train, batch_size=4)) for x in (splits, cached))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    # An error of a process is that of the row, with its place in the file.
    strict = DataOptions(drop_empty=True)
    rules = chunks.Rules(expand_all, strict, Kind())
    parts = [lambda: divisible(opened(path, strict)).part(48, 56)]
    with pytest.raises(InputError, match=r"pairs.jsonl row 51: a record must be"):
        list(chunk_pool.read_chunks(parts, TOKENIZER, rules, processes=1))
    # A number is checked by what the objective says, whoever has read it.
    numbered = [row | {"x": n} for n, row in enumerate(records()[:20])]
    path = write(tmp_path / "numbers.jsonl", numbered)
    monkeypatch.setattr(chunk_pool, "CHUNKS_PER_PROCESS", 1)
    del small[:]
    for _ in range(2):  # tokenized by processes, and from the cache
        with pytest.raises(InputError, match=REFUSED):
            make_splits(
                opened(path, NUMBERED),
                TOKENIZER,
                NUMBERED,
                kind=SMALL_NUMBERS,
                folder=tmp_path / "tokens",
            )
    assert not small


def refuse_large(name, value):
    """What an objective says of numbers."""
    if value > 16:
        raise ValueError("Expected beta <= 16.")


NUMBERED = DataOptions(drop_empty=True, columns=("beta=x",))
SMALL_NUMBERS = Kind(numbers=frozenset({"beta"}), check=refuse_large)
REFUSED = r"row 18: field 'x' for beta: Expected beta <= 16\. Correct it"


def expand_all(example, place):
    """One pair for each trace, as a function that processes can import."""
    return expand(example)


def test_only_what_has_changed_is_tokenized_again(tmp_path, small):
    rows, folder = records(), tmp_path / "tokens"
    path = write(tmp_path / "pairs.jsonl", rows)
    before = make_splits(opened(path), TOKENIZER, OPTIONS, folder=folder)
    del small[:]
    rows[60]["chosen"] = rows[60]["chosen"][:-1] + "Q"  # one character
    write(tmp_path / "pairs.jsonl", rows)
    changed = make_splits(opened(path), TOKENIZER, OPTIONS, folder=folder)
    assert small == [f"{path} row 57"]
    fresh = make_splits(opened(path), TOKENIZER, OPTIONS)
    assert changed.digest == fresh.digest != before.digest
    del small[:]
    # A copy of the file, a rate, a seed and a share need no other tokens.
    other = write(tmp_path / "copy.jsonl", rows)
    noise = InjectOptions(flip_rate=0.1, seed=6)
    options = dataclasses.replace(OPTIONS, inject=noise, heldout_fraction=0.1)
    again = make_splits(opened(other, options), TOKENIZER, options, folder=folder)
    assert not small and again.skipped[0].row == f"{other} row 51"
    assert again.digest == make_splits(opened(other), TOKENIZER, options).digest


def test_what_decides_the_tokens_names_them(tmp_path, small):
    rows, folder = [{"prompt": "q", "chosen": " a", "rejected": " b"}] * 8, tmp_path
    path = write(tmp_path / "pairs.jsonl", rows)
    stops = byte_tokenizer()
    stops.folder_stop_tokens = (5,)
    renamed = DataOptions(fields=("prompt=prompt",))
    for tokenizer, options, kind, whole_turns in [
        (byte_tokenizer(), DataOptions(), Kind(), False),
        (byte_tokenizer(merges=()), DataOptions(), Kind(), False),
        (byte_tokenizer(template=CHATML), DataOptions(), Kind(), False),
        (stops, DataOptions(), Kind(), False),
        (byte_tokenizer(), DataOptions(max_length=99), Kind(), False),
        (byte_tokenizer(), DataOptions(trace_open="<t>"), Kind(), False),
        (byte_tokenizer(), DataOptions(on_bad_row="skip"), Kind(), False),
        (byte_tokenizer(), renamed, Kind(), False),
        (byte_tokenizer(), DataOptions(), Kind(), True),
    ]:
        del small[:]
        for _ in range(2):
            make_splits(
                opened(path, options),
                tokenizer,
                options,
                kind=kind,
                whole_turns=whole_turns,
                folder=folder,
            )
        assert len(small) == 1, (options, whole_turns)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:10],
        lambda data: b"",
        lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
    ],
)
def test_damage_is_detected(tmp_path, small, damage, caplog):
    path, folder = write(tmp_path / "pairs.jsonl", records()), tmp_path / "tokens"
    make_splits(opened(path), TOKENIZER, OPTIONS, folder=folder)
    file = sorted(folder.iterdir())[3]
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    del small[:]
    splits = make_splits(opened(path), TOKENIZER, OPTIONS, folder=folder)
    assert len(small) == 1 and summary(splits) == BEFORE["noise"]
    assert f"{file}: damaged" in caplog.text and file.read_bytes() == whole


def test_a_folder_that_cannot_be_written(tmp_path, small, caplog):
    path, folder = write(tmp_path / "pairs.jsonl", records()), tmp_path / "tokens"
    folder.write_text("a file")
    splits = make_splits(opened(path), TOKENIZER, OPTIONS, folder=folder)
    assert summary(splits) == BEFORE["noise"] and "cannot be written" in caplog.text


def test_chunks_that_were_used_last_are_kept(tmp_path, small, monkeypatch, capsys):
    folder, rows = tmp_path / "tokens", records()[:32]
    files = [
        write(tmp_path / f"{n}.jsonl", [x | {"prompt": f"{n}"} for x in rows])
        for n in range(3)
    ]
    read = lambda n: make_splits(opened(files[n]), TOKENIZER, OPTIONS, folder=folder)
    sizes = lambda: sum(x.stat().st_size for x in folder.iterdir())
    read(0)
    first = {x.name for x in folder.iterdir()}
    read(1)
    assert len(first) == 4 and len(small) == 8
    assert "removed" not in capsys.readouterr().out
    # An hour ago both were used; now the first one is again.
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    read(0)
    (folder / "other").write_bytes(b"x" * 10_000)  # not a chunk
    (folder / "other").touch()
    limit = sizes() - 10_000
    monkeypatch.setenv("JAXPREF_CACHE_LIMIT", f"{limit / 1024}KiB")
    read(2)
    kept = {x.name for x in folder.iterdir()} - {"other"}
    assert first < kept and sizes() - 10_000 <= limit and (folder / "other").exists()
    assert "MiB that were not used for the longest time" in capsys.readouterr().out
    del small[:]
    assert summary(read(2)) == summary(read(2)) and not small
    monkeypatch.setenv("JAXPREF_CACHE_LIMIT", "0B")
    assert summary(read(1))[0] and len(small) == 4  # its chunks are in use until then
    assert {x.name for x in folder.iterdir()} == {"other"}


def test_limits_of_the_cache(tmp_path, monkeypatch):
    for given, size in {
        "": 20 * 2**30, "none": None, "1.5KiB": 1536, "2 TiB": 2**41, "7B": 7
    }.items():  # fmt: skip
        monkeypatch.setenv("JAXPREF_CACHE_LIMIT", given)
        assert cache_folder.cache_limit() == size
    for given in ("20", "20GB", "-1GiB", "much"):
        monkeypatch.setenv("JAXPREF_CACHE_LIMIT", given)
        with pytest.raises(InputError, match=f"LIMIT {given}: must be a size"):
            cache_folder.cache_limit()
    assert cache_folder.remove_least_recent(tmp_path / "none", "x", limit=0) == (0, 0)


def test_arrays_come_back():
    arrays = {"a": np.arange(5, dtype=np.uint16), "b": np.zeros((0, 2), np.int64)}
    arrays["c"] = np.array([[True, False]])
    data = pack(arrays, {"text": "\u00fc"})
    found, about = unpack(data)
    assert about == {"text": "\u00fc"} and found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    with pytest.raises(Damaged):
        unpack(data + b" ")


PROCESS = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import jax
from jaxpref.runtime.mesh import initialize_distributed
initialize_distributed()
from pathlib import Path
from jaxpref.data import chunk, chunk_pool, make_splits
from tests import test_large_files as tests

made = []
def counted(source, *rest, read=chunk.read_chunk):
    made.append(source.row_location(0))
    return read(source, *rest)
chunk_pool.read_chunk, chunk.ROWS = counted, 8
chunk_pool.CHUNKS_PER_PROCESS = 1000
folder, results = Path(sys.argv[2]), {}
rank = jax.process_index()
strict = tests.DataOptions(drop_empty=True)
for name, tokens, options, kind in (
    ("one disk", "tokens", tests.OPTIONS, tests.Kind()),
    ("again", "tokens", tests.OPTIONS, tests.Kind()),
    ("own disks", f"tokens{rank}", tests.OPTIONS, tests.Kind()),
    ("restarted without a disk", f"tokens{rank}" if rank else "new", tests.OPTIONS,
     tests.Kind()),
    ("wrong", f"wrong{rank}", strict, tests.Kind()),
    ("refused", f"refused{rank}", tests.NUMBERED, tests.SMALL_NUMBERS),
):
    del made[:]
    file = "numbers.jsonl" if options is tests.NUMBERED else "pairs.jsonl"
    source = tests.opened(str(folder / file), options)
    try:
        splits = make_splits(
            source, tests.TOKENIZER, options, kind=kind, folder=folder / tokens
        )
        found = tests.summary(splits)
    except tests.InputError as error:
        found = str(error)
    results[name] = [len(made), found]
(folder / f"{rank}.json").write_text(json.dumps(results))
"""


def test_processes_of_a_run_share_the_work(tmp_path):
    path = write(tmp_path / "pairs.jsonl", records())
    numbered = [row | {"x": n} for n, row in enumerate(records()[:20])]
    write(tmp_path / "numbers.jsonl", numbered)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    distributed = {
        "XLA_FLAGS": xla_flags(1),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, ROOT, tmp_path],
            env=os.environ | distributed | {"JAX_PROCESS_ID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0], [x[-2000:] for x in errors]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for name, counts in {
        "one disk": (7, 6),
        "again": (0, 0),
        "own disks": (7, 6),
        "restarted without a disk": (0, 0),  # the other process has all
    }.items():
        assert tuple(results[name][0] for results in found) == counts, name
        for results in found:
            assert results[name][1] == [*BEFORE["noise"]], name
    for results in found:
        assert results["wrong"][1].startswith(f"{path} row 51: a record must be a JSON")
        assert re.search(REFUSED, results["refused"][1])
