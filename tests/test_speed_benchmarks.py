"""The benchmarks of memory, scaling and GPUs: what they count, and that they run."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu, memory, scaling
from benchmarks.random_steps import packed_batch, padded_batch, random_pairs
from jaxpref.errors import InputError
from jaxpref.models import build
from jaxpref.train.scores import packed_mask
from tests.tiny import tiny_config, tiny_params

LENGTHS = np.array([[3, 4, 6], [5, 2, 3], [2, 7, 4], [4, 4, 5]])


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_heads_that_memory_compares_compute_the_same(layout):
    model = build(tiny_config())
    params = tiny_params(model)
    pairs = random_pairs(LENGTHS, vocab_size=model.config.vocab_size)
    batch = (
        padded_batch(pairs)
        if layout == "padded"
        else packed_batch(pairs, row_length=32)
    )
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    ours, log_softmax, logsumexp, none = (
        jax.jit(make(model))(params, batch)["policy_logps"]
        for make in memory.HEADS.values()
    )
    assert np.abs(ours).max() > 1
    np.testing.assert_allclose(log_softmax, ours, rtol=2e-6, atol=2e-5)
    np.testing.assert_allclose(logsumexp, ours, rtol=2e-6, atol=2e-5)
    assert none.shape == ours.shape


def test_logits_of_all_positions_take_more_memory():
    model = build(tiny_config(vocab_size=4096))
    pairs = random_pairs(np.full((4, 3), 32), vocab_size=4096)
    found = {
        name: memory.temporaries(model, make(model), padded_batch(pairs))
        for name, make in memory.HEADS.items()
    }
    # Four pairs of two sequences of 64 tokens, float32.
    assert found["log_softmax"] - found["none"] > 4 * 2 * 64 * 4096 * 4
    assert found["none"] <= found["ours"] < found["logsumexp"] < found["log_softmax"]


def test_useful_flops_are_those_of_the_mask_and_the_weights():
    config = tiny_config()
    model = build(config)
    pairs = random_pairs(LENGTHS, vocab_size=config.vocab_size)
    found = gpu.useful_flops(config, pairs.prompt_lengths, pairs.completion_lengths)
    params = jax.eval_shape(model.init, jax.random.key(0))
    matrices = [x for x in jax.tree.leaves(params["layers"]) if len(x.shape) > 2]
    weights = sum(x.size for x in matrices)  # of all layers
    batch = packed_batch(pairs, row_length=64)
    segments = batch.segments[0, :, 0]
    seen = np.asarray(packed_mask(segments)) & (segments >= 0)[:, :, None]
    held = batch.pairs[batch.pairs >= 0]  # some twice, to fill the row
    tokens, answers = LENGTHS[held].sum(), LENGTHS[held, 1:].sum()
    # Once for the scores, once for the values, of each head.
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * seen.sum()
    head = config.hidden_size * config.vocab_size * answers
    assert found[held].sum() == 6 * (weights * tokens + attention + head)


def test_cards_are_known_by_their_whole_name():
    assert gpu.peak_of("NVIDIA H200", None) == 989
    assert gpu.peak_of("NVIDIA H100 PCIe", None) == 756
    assert gpu.peak_of("NVIDIA A100-SXM4-80GB", None) == 312
    assert gpu.peak_of("NVIDIA L40S", None) == 362
    assert gpu.peak_of("Quadro", 50.0) == 50
    with pytest.raises(InputError, match="L400: its peak rate is not known"):
        gpu.peak_of("NVIDIA L400", None)


def test_exponents_of_power_laws():
    sizes = np.array([1, 2, 4, 8])
    seconds = np.stack([3 * sizes**1.5, sizes**1.0, 0.1 * sizes**2.0], axis=1)
    found = scaling.fit(sizes, seconds)
    np.testing.assert_allclose(
        [found["exponent"], found["low"], found["high"]], [1.5, 1, 2], rtol=1e-12
    )
    # A fixed cost hides growth from the fit, not from its steepest piece.
    fixed = scaling.fit(sizes, (10 + sizes**2.0)[:, None])
    assert fixed["steepest"] > fixed["exponent"]
    records = [
        {"size": n, "seconds": [n**2.0 + n], "attention_seconds": [n**2.0]}
        for n in (1, 2, 4)
    ]
    fits = scaling.fits_of(records)
    assert fits["without attention"]["exponent"] == pytest.approx(1)
    assert 1 < fits["step"]["exponent"] < 2


def test_scaling_is_drawn(tmp_path):
    records = [
        {"axis": axis, "size": n, "seconds": [n, 1.1 * n]}
        | ({} if axis == "devices" else {"attention_seconds": [0.1 * n, 0.2 * n]})
        for axis in ("length", "devices")
        for n in (1, 2, 4)
    ]
    fits = {
        axis: scaling.fits_of([r for r in records if r["axis"] == axis])
        for axis in ("length", "devices")
    }
    scaling.draw(tmp_path / "scaling.png", records, fits)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def command(module, *options):
    """As a user types it, on one device."""
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *map(str, options)],
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_without_a_gpu_one_line_and_no_error():
    done = command("gpu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("no GPU") and done.stdout.count("\n") == 1


@pytest.mark.slow
def test_the_dry_run_of_a_gpu():
    options = (
        "--platform cpu --tiny --row-length 128 --batch-size 2 --blocks 1 --steps 1"
    )
    done = command("gpu", *options.split())
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("dry run") and "MFU" not in done.stdout


@pytest.mark.slow
def test_scaling_on_virtual_devices(tmp_path):
    options = (
        "--axes length devices --lengths 32 64 --devices 1 2 --vocabulary 512 "
        "--length 32 --hidden 128 --quick --json"
    )
    done = command("scaling", *options.split(), tmp_path / "scaling.json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "devices 2:" in done.stdout and "length, without attention" in done.stdout
    assert (tmp_path / "scaling.json").exists()


def test_sizes_of_a_quick_run():
    config = scaling.ScalingConfig()
    assert scaling.sizes_of(config, "length") == (256, 512, 1024, 2048, 4096)
    quick = dataclasses.replace(config, quick=True)
    assert scaling.sizes_of(quick, "length") == (256, 512, 1024)
    assert scaling.sizes_of(quick, "batch") == (1, 2)
    with pytest.raises(InputError, match="give at least two"):
        scaling.ScalingConfig(lengths=(256,))
