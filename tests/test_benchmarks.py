"""Calculations of the benchmarks: operations, records, and agreement."""

import json
import math

import jax
import numpy as np
import pytest

from benchmarks.peers.cases import CASES, FIXED_MODEL, random_pairs, sizes, write_model
from benchmarks.peers.job import Job, Steps, read_pairs, write_steps
from benchmarks.peers.records import (
    disagreements,
    ratios,
    summarize,
    table,
    useful_flops,
)
from benchmarks.step import Options, for_a_look, shortened, with_options
from jaxpref.errors import InputError
from jaxpref.models import build
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import read_architecture
from tests.tiny import tiny_config


def counted(config, prompt, answers):
    """Multiplications and additions, by matrix and by key."""
    D, K = config.hidden_size, config.head_dim
    H, G = config.num_heads, config.num_kv_heads
    matrices = [(D, H * K), (D, G * K), (D, G * K), (H * K, D)]
    matrices += [(D, config.intermediate_size)] * 2 + [(config.intermediate_size, D)]
    forward = 0
    for _ in range(config.num_layers):
        for _ in range(prompt + sum(answers)):
            forward += sum(2 * rows * columns for rows, columns in matrices)
        for start, length in [(0, prompt)] + [(prompt, answer) for answer in answers]:
            for place in range(length):
                # Scores and weighted sum of values, for itself and earlier tokens.
                forward += 2 * (2 * H * K) * (start + place + 1)
    forward += sum(answers) * 2 * D * config.vocab_size
    return 3 * forward


def test_useful_flops_count_each_token_once():
    config = tiny_config(num_heads=4, num_kv_heads=2)
    found = useful_flops(config, np.array([5, 1]), np.array([[3, 2], [1, 7]]))
    expected = [counted(config, 5, (3, 2)), counted(config, 1, (1, 7))]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_useful_flops_of_the_fixed_case():
    listed = random_pairs(CASES["fixed"], FIXED_MODEL.vocab_size, 4)
    # 1,792 tokens through 25.7 million weights, 1,536 through the head of 16.4 million,
    # and attention.
    layers = 8 * (4 * 512**2 + 3 * 512 * 1408)
    keys = 4 * (64 * 65 / 2 + 2 * (192 * 64 + 192 * 193 / 2))
    expected = 6 * (1792 * layers + 1536 * 512 * 32000 + 2 * 8 * 512 * keys)
    assert useful_flops(FIXED_MODEL, *sizes(listed)).sum() == pytest.approx(expected)
    assert 430e9 < expected < 450e9


def run_of(seconds, pairs, peak=100.0):
    return {
        "seconds": seconds,
        "warmup_seconds": [9.0],
        "pairs": pairs,
        "peak_mib": peak,
        "versions": {"numpy": "2"},
    }


def summary(system, runs, *, prompts, answers):
    lists = [(np.array(prompts), np.array(answers))] * len(runs)
    return summarize("hh", system, runs, lists, tiny_config(), warmup=1, rate=1e9)


def test_a_record_has_medians_over_rounds():
    # The first pair belongs to the warm-up; the mean of the others is 10 tokens.
    prompts, answers = [90, 4, 8], [[1, 1], [2, 2], [2, 2]]
    runs = [run_of([s, s], [[1], [2]], peak) for s, peak in [(1, 9), (2, 5), (4, 7)]]
    record = summary("trl", runs, prompts=prompts, answers=answers)
    assert record["case"] == "hh" and record["system"] == "trl"
    assert record["pairs_per_second"] == 0.5
    assert record["spread"] == [0.375, 0.75]
    assert record["seconds_per_step"] == 2 and record["peak_mib"] == 7
    assert record["pairs_per_step"] == 1 and record["steps"] == 6
    config = tiny_config()
    flops = counted(config, 4, (2, 2)) + counted(config, 8, (2, 2))
    assert record["utilization"] == pytest.approx(flops / 4 / 1e9)
    json.dumps(record)


def test_a_short_pair_counts_less_than_one():
    # Packed steps that contained the short pair twice and the long one never.
    runs = [run_of([1.0], [[1, 1]])]
    record = summary(
        "jaxpref", runs, prompts=[9, 4, 8], answers=[[1, 1], [2, 2], [2, 2]]
    )
    assert record["pairs_per_second"] == pytest.approx(2 * 8 / 10)


def test_ratios_are_of_paired_rounds():
    def record(case, system, speeds, peak):
        return {
            "case": case,
            "system": system,
            "pairs_per_second_of_rounds": speeds,
            "peak_mib": peak,
        }

    found = ratios(
        [
            record("hh", "jaxpref", [4.0, 2.0, 9.0], 50),
            record("hh", "trl", [1.0, 1.0, 3.0], 100),
            record("fixed", "trl", [1.0, 1.0, 3.0], 100),
        ]
    )
    assert found == [
        {
            "case": "hh",
            "system": "trl",
            "speed": 3.0,
            "speed_spread": [2.5, 3.5],
            "memory": 0.5,
        }
    ]


def test_the_table_has_a_line_for_each_record_and_ratio():
    pairs = dict(prompts=[90, 4, 8], answers=[[1, 1], [2, 2], [2, 2]])
    runs = [run_of([1.0, 1.0], [[1], [2]])]
    lines = table([summary(s, runs, **pairs) for s in ("jaxpref", "trl")]).splitlines()
    assert len(lines) == 4 and "1.00 times" in lines[-1]


def test_disagreements_are_reported():
    log2 = math.log(2)
    good = {"losses": [log2, 0.68, 0.66], "grad_norms": [10.0]}
    close = {"losses": [log2 + 1e-5, 0.6801, 0.6604], "grad_norms": [10.001]}
    assert disagreements({"jaxpref": good, "trl": close}) == []
    (line,) = disagreements(
        {"jaxpref": good, "trl": {**good, "losses": [0.70, 0.68, 0.66]}}
    )
    assert line == "trl: the first loss is 0.700000, not log 2"
    (line,) = disagreements({"jaxpref": good, "trl": {**good, "grad_norms": [10.1]}})
    assert "norm is 10.1, not 10 as of jaxpref" in line
    (line,) = disagreements(
        {"jaxpref": good, "trl": {**good, "losses": [log2, 0.69, 0.66]}}
    )
    assert "the loss of step 1 is 0.690000" in line
    nan = {"losses": [math.nan], "grad_norms": [math.nan]}
    assert len(disagreements({"jaxpref": good, "trl": nan})) == 2


def test_the_model_folder_round_trips(tmp_path):
    config = tiny_config(tie_word_embeddings=False)
    write_model(tmp_path / "model", config)
    write_model(tmp_path / "again", config)
    files = [tmp_path / name / "model.safetensors" for name in ("model", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    model = build(read_architecture(tmp_path / "model"))
    assert model.architecture == config
    params = load_params(tmp_path / "model", model)
    shapes = jax.tree.map(lambda x: x.shape, params)
    expected = jax.eval_shape(model.init, jax.random.key(0))
    assert shapes == jax.tree.map(lambda x: x.shape, expected)
    assert np.std(params["embed"]) == pytest.approx(0.02, rel=0.1)


def test_a_job_returns_the_results_of_its_process(tmp_path):
    (tmp_path / "pairs.json").write_text(
        json.dumps([[[n], [n], [n]] for n in range(9)])
    )
    job = Job(mode="train", threads=1, pairs=str(tmp_path / "pairs.json"), batch_size=2)
    repeated = Job(
        mode="train",
        threads=1,
        pairs=job.pairs,
        batch_size=2,
        warmup=0,
        steps=2,
        repeat=True,
    )
    assert [pair[0][0] for pair in read_pairs(repeated)] == [0, 1, 0, 1]
    steps = Steps([0.7, 0.6], [1.0, 2.0], [0.0, 5.0, 6.5], [[2, 3]])
    write_steps(tmp_path / "out.json", job, steps, ["numpy"])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["seconds"] == [1.5] and found["warmup_seconds"] == [5.0]
    assert found["losses"] == [0.6] and found["pairs"] == [[2, 3]]
    assert found["peak_mib"] > 10 and found["versions"]["numpy"] == np.__version__


def test_invalid_options_are_one_line():
    with pytest.raises(InputError, match="--cases: 'hhh' is not one of hh"):
        Options(json="x", cases="hhh")
    with pytest.raises(InputError, match="--systems: 'easydel'"):
        Options(json="x", systems="jaxpref,easydel")
    options = Options(json="x", row_length="hh=512,fixed=-1")
    assert with_options(CASES["hh"], options).row_length == 512
    assert with_options(CASES["fixed"], options).row_length == -1
    assert with_options(CASES["ultrafeedback"], options).row_length == 0
    with pytest.raises(InputError, match="--row-length: 'hh' is not CASE=TOKENS"):
        with_options(CASES["hh"], Options(json="x", row_length="hh"))
    quick = for_a_look(Options(json="x", quick=True))
    assert with_options(CASES["ultrafeedback"], quick).micro_batch == 2
    assert shortened([[[*range(100)], [1] * 90, [2]]]) == [
        [[*range(36, 100)], [1] * 64, [2]]
    ]
