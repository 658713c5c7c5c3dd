"""The benchmarks of memory, scaling, and GPUs run, and calculate correctly."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu, memory, sampling, scaling
from benchmarks.random_steps import (
    packed_batch,
    padded_batch,
    pair_a_row_batch,
    random_pairs,
)
from jaxpref.errors import InputError
from jaxpref.models import build, logprobs
from tests.tiny import make_model_folder, tiny_config, tiny_params

LENGTHS = np.array([[3, 4, 6], [5, 2, 3], [2, 7, 4], [4, 4, 5]])


def test_compared_heads_compute_the_same():
    model = build(tiny_config())
    params = tiny_params(model)
    pairs = random_pairs(LENGTHS, vocab_size=model.architecture.vocab_size)
    packed, padded = (
        jax.tree.map(lambda x: jnp.asarray(x[0]), make(pairs))
        for make in (pair_a_row_batch, padded_batch)
    )
    # The same pair in each row, with its prompt once or twice.
    cases = [(make, packed) for make in memory.HEADS.values()]
    heads = (memory.HEADS["log_softmax"], *memory.PEERS.values())
    cases += [(make, padded) for make in heads]
    ours, log_softmax, logsumexp, none, *others = jax.jit(
        lambda params, batches: [
            make(model)(params, None, batch).scores["policy_logps"]
            for (make, _), batch in zip(cases, batches)
        ]
    )(params, [batch for _, batch in cases])
    assert ours.shape == none.shape == (4, 1, 2) and np.abs(ours).max() > 1
    for found in (log_softmax, logsumexp, *others):
        np.testing.assert_allclose(found, ours, rtol=2e-6, atol=2e-5)


def test_memory_compares_the_same_pairs():
    batches = memory.random_batches(memory.MemoryConfig(), 64, 512)
    assert batches["packed"].tokens.shape == (1, 4, 1, 112)
    assert batches["padded"].tokens.shape == (1, 4, 2, 64)
    assert all((b.lengths == b.tokens.shape[-1]).all() for b in batches.values())


@pytest.mark.slow
def test_logits_of_all_positions_take_more_memory(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 2**20)  # the default holds all logits
    sizes = tiny_config(vocab_size=4096, num_layers=1)
    found = memory.measure(memory.MemoryConfig(), sizes, "packed", 64)
    mib = found["mib"]
    # Four pairs of two sequences of 64 tokens, or one row of 112; float32.
    assert found["tokens"] == {"ours": 4 * 112, "peers": 4 * 2 * 64}
    assert mib["log_softmax"] - mib["none"] > 4 * 112 * 4096 * 4 / 2**20
    assert mib["peers"] - mib["none"] > 2 * 4 * 2 * 64 * 4096 * 4 / 2**20
    assert mib["none"] <= mib["ours"] < mib["logsumexp"] < mib["log_softmax"]
    assert mib["logsumexp"] < mib["thrifty"] < mib["peers"]
    assert found["ratios"]["peers"] == pytest.approx(mib["ours"] / mib["peers"])


def test_useful_flops_count_the_mask_and_the_weights():
    config = tiny_config()
    model = build(config)
    pairs = random_pairs(LENGTHS, vocab_size=config.vocab_size)
    found = gpu.useful_flops(config, pairs.prompt_lengths, pairs.completion_lengths)
    params = jax.eval_shape(model.init, jax.random.key(0))
    matrices = [x for x in jax.tree.leaves(params["layers"]) if len(x.shape) > 2]
    weights = sum(x.size for x in matrices)  # of all layers
    batch = packed_batch(pairs, row_length=64)
    segments = batch.segments.reshape(-1, batch.segments.shape[-1])
    parts = batch.num_parts
    key, query = segments[:, None], segments[:, :, None]
    parts = batch.num_parts
    seen = (query >= 0) & (key // parts == query // parts)
    seen &= (key % parts == 0) | (key == query)
    seen &= np.tri(segments.shape[1], dtype=bool)
    held = batch.pair_index[batch.pair_index >= 0]  # some twice, to fill the row
    tokens, answers = LENGTHS[held].sum(), LENGTHS[held, 1:].sum()
    # Once for the scores and once for the values of each head.
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * seen.sum()
    head = config.hidden_size * config.vocab_size * answers
    assert found[held].sum() == 6 * (weights * tokens + attention + head)


def test_cards_are_identified_by_their_full_name():
    assert gpu.peak_of("NVIDIA H200", None) == 989
    assert gpu.peak_of("NVIDIA H100 PCIe", None) == 756
    assert gpu.peak_of("NVIDIA A100-SXM4-80GB", None) == 312
    assert gpu.peak_of("NVIDIA L40S", None) == 362
    assert gpu.peak_of("Quadro", 50.0) == 50
    assert gpu.peak_of("NVIDIA A10", None) == 125
    for kind in ("NVIDIA L400", "NVIDIA H100 NVL", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"):
        with pytest.raises(InputError, match=f"{kind}: unknown peak rate"):
            gpu.peak_of(kind, None)


def test_exponents_of_power_laws():
    sizes = np.array([1, 2, 4, 8])
    seconds = np.stack([3 * sizes**1.5, sizes**1.0, 0.1 * sizes**2.0], axis=1)
    found = scaling.fit(sizes, seconds)
    np.testing.assert_allclose([found["low"], found["high"]], [1, 2], rtol=1e-12)
    # One outlier per turn does not affect the medians.
    disturbed = np.tile(sizes[:, None] ** 1.5, 3) * np.where(np.eye(4, 3), 9, 1)
    assert scaling.fit(sizes, disturbed)["exponent"] == pytest.approx(1.5)
    # A fixed cost reduces the exponent, least between the largest sizes.
    fixed = scaling.fit(sizes, (10 + sizes**2.0)[:, None])
    assert fixed["last"] > fixed["exponent"]
    records = [
        {"size": n, "seconds": [n**2.0 + n], "attention_seconds": [n**2.0]}
        for n in (1, 2, 4)
    ]
    fits = scaling.fits_of(records)
    assert fits["without attention"]["exponent"] == pytest.approx(1)
    assert fits["attention alone"]["exponent"] == pytest.approx(2)
    assert 1 < fits["step"]["exponent"] < 2


def test_sizes_of_scaling():
    config = scaling.ScalingConfig(hidden=192, layers=1, vocabulary=512)
    model, batch = scaling.make_model_and_batch(config, {"length": 70, "pairs": 2})
    assert batch.lengths.tolist() == [[[70], [70]]]
    assert batch.completion_lengths.tolist() == [[[[30, 30]]] * 2]
    gradients = scaling.attention_alone(model, batch)()
    assert [x.shape[-2] for x in gradients] == [3, 1, 1]  # heads
    # All queries have gradients but the first of a row, which sees only itself.
    assert np.asarray(jnp.abs(gradients[0]).sum((0, 3, 4)) > 0)[:, 1:].all()


def test_scaling_is_drawn(tmp_path):
    records = [
        {"axis": axis, "size": n, "seconds": [n, 1.1 * n]}
        | ({"attention_seconds": [0.1 * n, 0.2 * n]} if axis == "length" else {})
        for axis in ("length", "devices")
        for n in (1, 2, 4)
    ]
    fits = {
        axis: scaling.fits_of([r for r in records if r["axis"] == axis])
        for axis in ("length", "devices")
    }
    scaling.draw(tmp_path / "scaling.png", records, fits)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_one_line_and_no_error(capsys):
    gpu.main(gpu.GpuConfig())
    printed = capsys.readouterr().out
    assert printed.startswith("no GPU") and printed.count("\n") == 1


def command(module, *options):
    """Runs the command as a user would, on one device."""
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *map(str, options)],
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
    )


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
        "--length 32 --hidden 192 --layers 1 --quick --json"
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
    assert scaling.sizes_of(quick, "pairs") == (1, 2)
    assert scaling.axes_of(config) == tuple(scaling.FIELDS)
    assert scaling.axes_of(quick) == ("length", "pairs")
    asked = dataclasses.replace(quick, axes=("devices",))
    assert scaling.axes_of(asked) == ("devices",)
    assert scaling.turns_of(config) == 3 and scaling.turns_of(quick) == 2
    with pytest.raises(InputError, match="give at least two"):
        scaling.ScalingConfig(lengths=(256,))


def test_the_sampler_benchmark_asks_all_systems_the_same(tmp_path):
    make_model_folder(tmp_path / "m")
    options = sampling.Options(model=str(tmp_path / "m"), json="x", prompts=50)
    job = sampling.job_of(options, 0)
    assert job == sampling.job_of(options, 0) != sampling.job_of(options, 1)
    assert set(map(len, job["prompts"])) <= set(range(8, 65))
    assert job["cases"]["fixed"] == [256] * 50
    mixed = job["cases"]["mixed"]
    assert max(mixed) == 256 and 8 <= min(mixed) < 40
    with pytest.raises(InputError, match="--cases long: the cases are fixed and mixed"):
        sampling.job_of(dataclasses.replace(options, cases="long"), 0)
    runs = [
        {
            "case": "fixed",
            "system": system,
            "tokens": 60,
            "seconds": s,
            "cpu_seconds": 2,
        }
        for system, s in [("jaxpref", 1), ("jaxpref", 2), ("jaxpref", 6), ("torch", 3)]
    ]
    assert sampling.medians(runs) == {
        "fixed": {
            "jaxpref": {"tokens_per_second": 30, "tokens_per_cpu_second": 30},
            "torch": {"tokens_per_second": 20, "tokens_per_cpu_second": 30},
        }
    }
