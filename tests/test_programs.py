"""Programs: one of each in a run, none compiled a second time, and what is told."""

import functools
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxpref import data, losses
from jaxpref.data.layouts import choose
from jaxpref.data.layouts.choose import padding_advice
from jaxpref.errors import InputError
from jaxpref.objectives import from_loss
from jaxpref.runtime.cache_folder import cache_folder
from jaxpref.runtime.compilation import enable_compilation_cache, log_compilations
from jaxpref.train import MeshConfig, TrainConfig, run
from tests.compiled import programs

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("row_length", ["none", 64], ids=["padded", "packed"])
def test_each_program_is_compiled_once_and_after_a_resume_none(
    inputs, tmp_path, row_length, capsys, monkeypatch
):
    monkeypatch.setattr(choose, "WORTHWHILE", 0.0)  # always suggests packing
    config = TrainConfig(
        model=str(inputs / "model"),
        data=str(inputs / "pairs.jsonl"),
        out=str(tmp_path / "run"),
        objective=from_loss(losses.dpo),
        options=data.DataOptions(heldout_fraction=0.2),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        max_steps=4,
        batch_size=16,
        row_length=row_length,
        eval_every=2,
        save_every=2,
    )
    small = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        with programs() as first:
            run(config)
        shutil.rmtree(tmp_path / "run" / "export")
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
        with programs() as resumed:
            run(config)
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", small)
    for name in ("jit(train_step)", "jit(score_step)"):
        assert [n for n, _ in first].count(name) == 1
        assert [entry for entry in resumed if entry[0] == name] == [(name, True)]
    assert all(from_disk for _, from_disk in resumed), resumed
    told = capsys.readouterr().out
    assert told.count("16 pairs per step") == 2
    # Of padding, where there is any.
    assert told.count("--row-length") == (2 if row_length == "none" else 0)


COMPILE = """
import jax, jax.numpy as jnp
from jaxpref.runtime.entry import entry_point
with entry_point():
    jax.jit(lambda x: jnp.sin(x) + 1)(jnp.ones(3)).block_until_ready()
"""


@pytest.mark.parametrize("told", [None, "elsewhere", ""])
def test_programs_are_kept_where_nobody_said_otherwise(tmp_path, told):
    environ = os.environ | {"JAXPREF_CACHE": str(tmp_path / "cache")}
    environ = {k: v for k, v in environ.items() if not k.startswith(("JAX_C", "JAX_P"))}
    if told is not None:
        environ["JAX_COMPILATION_CACHE_DIR"] = told and str(tmp_path / told)
        environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environ |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    folders = {path.name for path in tmp_path.iterdir()}
    assert folders == {None: {"cache"}, "elsewhere": {"elsewhere"}, "": set()}[told]
    if told is None:
        assert any("lambda" in p.name for p in (tmp_path / "cache/compiled").iterdir())


# A stand-in for the package that reaches buckets: theirs are folders of one folder.
GCSFS = """
import os
from fsspec.implementations.local import LocalFileSystem

class GCSFileSystem(LocalFileSystem):
    protocol = ("gs", "gcs")

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path).removeprefix("gs://")
        return path if path.startswith("/") else os.environ["BUCKETS"] + "/" + path
"""
COUNTED = f"""
import jax
hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: event.endswith("/cache_hits") and hits.append(event))
{COMPILE}
print(len(hits))
"""


def test_programs_are_kept_in_a_bucket(tmp_path):
    environ = {k: v for k, v in os.environ.items() if not k.startswith("JAX_P")}
    environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": "gs://bucket/compiled",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "BUCKETS": str(tmp_path / "buckets"),
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
    }
    (tmp_path / "gcsfs.py").write_text(GCSFS)
    command = [sys.executable, "-c", COUNTED]
    for again in (False, True):
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert (int(done.stdout) > 0) == again
    kept = list((tmp_path / "buckets/bucket/compiled").iterdir())
    assert any("lambda" in path.name for path in kept)


def test_a_bucket_that_nothing_reaches_is_refused(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/compiled")
    try:
        with pytest.raises(
            InputError, match="gs://bucket/compiled: a bucket requires gcs"
        ):
            enable_compilation_cache()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_scores_are_kept_in_folders_alone(monkeypatch):
    monkeypatch.setenv("JAXPREF_CACHE", "gs://bucket/cache")
    with pytest.raises(InputError, match="gs://bucket/cache: must be a folder;"):
        cache_folder()


def test_a_cache_folder_that_cannot_be_written_stops_nobody(tmp_path):
    (tmp_path / "file").write_text("in the way")
    environ = os.environ | {"JAXPREF_CACHE": str(tmp_path / "file" / "cache")}
    del environ["JAX_COMPILATION_CACHE_DIR"]
    command = [sys.executable, "-c", COMPILE]
    environ |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_command_line_tells_what_it_compiles(inputs, tmp_path):
    """A second run finds everything on disk, in a process of its own."""
    environ = os.environ | {
        "JAXPREF_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
    }
    del environ["JAX_COMPILATION_CACHE_DIR"]
    del environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]

    def lines(out):
        options = {
            "model": inputs / "model",
            "data": inputs / "pairs.jsonl",
            "out": tmp_path / out,
            "max-steps": 2,
            "batch-size": 8,
            "heldout-fraction": 0.2,
            "row-length": "none",
        }
        argv = [str(x) for k, v in options.items() for x in (f"--{k}", v)]
        command = [sys.executable, "-m", "jaxpref", "train", *argv]
        done = subprocess.run(
            [*command, "--explain-compiles"],
            env=environ,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        told = done.stdout.splitlines()
        return [
            line for line in told if line.startswith(("compiled", "from the cache"))
        ]

    new, known = lines("one"), lines("two")
    (step,) = [line for line in new if "jit(train_step)" in line]
    assert step.startswith("compiled in ")
    assert "int32[1,8@(data,fsdp),2,16]" in step
    assert len(known) == len(new)
    assert all(line.startswith("from the cache in ") for line in known)


def test_what_is_compiled_is_explained_and_warnings_still_come(capsys, caplog):
    def twice_and_more(x, y, z):
        return 2 * x + y @ z

    x = jnp.ones((3, 3))
    logger = logging.getLogger("jax")
    before = logger.level, logger.propagate, list(logger.handlers)
    with log_compilations():
        jax.jit(twice_and_more)(x, x, jnp.ones((3, 1)))
        logging.getLogger("jax.inner").warning("something else")
        logging.getLogger("jax.inner").debug("chatter")
    told = capsys.readouterr().out
    (line,) = [x for x in told.splitlines() if "twice_and_more" in x]
    assert line.endswith("jit(twice_and_more) of 2 x float32[3,3], float32[3,1]")
    assert "compiled in" in told or "from the cache in" in told
    assert "something else" in caplog.text and "chatter" not in caplog.text
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_the_shape_is_told():
    sizes = dict(predictions=16, num_completions=2, batch_size=8)
    layout = data.PaddedLayout(sequence_length=48, accumulation=2, **sizes)
    assert layout.describe() == (
        "8 pairs per step, one per row: 2 x 4 rows of 2 x 48 tokens"
    )
    sizes |= {"slots": 5, "rows": 6, "utilization": 0.926}
    layout = data.PackedLayout(row_length=64, **sizes)
    assert layout.describe() == (
        "8 pairs per step, packed: at most 1 x 6 rows of 64 tokens, about 93% of them "
        "real"
    )


def test_what_packed_rows_would_save_is_told():
    builder = data.DatasetBuilder(2)
    for n in range(4):
        builder.add([5] * 20, [[6] * 10, [7] * (10 + n)], id=str(n))
    pairs = builder.build()
    sizes = dict(predictions=16, num_completions=2, batch_size=8)
    advice = functools.partial(
        padding_advice,
        order=data.in_order(pairs),
        train=pairs,
        heldout=pairs,
        shards=2,
    )
    wide = data.PaddedLayout(sequence_length=48, **sizes)
    # 2 x 48 tokens for 41.5; a row of 64 holds one pair.
    assert "padding overhead 2.3x" in advice(wide)
    assert "--row-length 64 would reduce it to 1.54x" in advice(wide)
    assert advice(data.PaddedLayout(sequence_length=26, **sizes)) is None
    # Rows of 64 would save too little.
    assert advice(data.PaddedLayout(sequence_length=40, **sizes)) is None
