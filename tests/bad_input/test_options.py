"""The command line: the complaint names the option."""

from pathlib import Path

import pytest

from tests.bad_input.spoiled import PADDED, SHORT


def test_an_unknown_command(refuse):
    refuse(["trian"], "trian: no such command; did you mean train?", "sample")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--learning-rat", 1], ["--learning-rat:", "mean --learning-rate?"]),
        (
            ["--loss", "ipo", "--loss.label-smoothing", 0.1],
            ["--loss.label-smoothing:", "--loss ipo has no such option"],
        ),
        (["--loss", "rdpo"], ["--loss rdpo: needs --loss.flip-rate"]),
        (
            ["--loss", "rdpo", "--loss.fliprate", 0.1],
            ["did you mean --loss.flip-rate?"],
        ),
        (["--prior-right", 0.1, "--objective", "em"], ["--objective.prior-right?"]),
        (["--loss.beta", "much"], ["--loss.beta much: expected FLOAT"]),
        (["--loss.beta"], ["--loss.beta: expected a value after it: FLOAT"]),
        (["--compute-dtype", "int8"], ["--compute-dtype int8: ", "bfloat16"]),
        (["--decay", "cosin"], ["--decay cosin: ", "did you mean cosine?"]),
        (["--drop-empty", "yes"], ["--drop-empty yes: takes no value"]),
        (["--drop-empty", "--no-drop-empty"], ["--drop-empty: ", "--no-drop-empty"]),
        (["--loss", "rdop"], ["--loss rdop: no such loss; did you mean rdpo?"]),
        (
            ["--objective", "learnt_rate"],
            ["--objective learnt_rate: ", "did you mean learned_rate?"],
        ),
        (
            ["--loss", "sft", "--objective", "em"],
            ["--objective em: sft has its own objective"],
        ),
        (["--data", "a", "--data", "a"], ["--data a: is given more than once"]),
        (["--max_steps", 3], ["--max-steps: given more than once"]),
        (["--seed", 1, "--seed=2"], ["--seed: given more than once"]),
    ],
)
def test_options_that_the_parser_refuses(inputs, refuse, options, fragments):
    refuse(inputs.train(*options), *fragments)
    assert not inputs.out.exists()


def test_a_word_that_belongs_to_no_option(refuse):
    refuse(["train", "pairs.jsonl"], "pairs.jsonl: expected an option")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--loss", "zzz"], ["--loss zzz", "one of", "rdpo"]),
        (["--loss"], ["--loss"]),
        (["--loss", "rdpo", "--loss.flip-rate", 0.7], ["rdpo", "flip_rate", "0.7"]),
        (["--loss.beta", 0], ["dpo", "beta"]),
        (["--loss.beta", "nan"], ["--loss.beta nan", "finite"]),
        (["--inject.flip-rate", 1.5], ["inject.flip_rate 1.5"]),
        (["--learning-rate", "inf"], ["learning_rate inf"]),
        (["--adam-b1", 1.0], ["adam_b1 1.0"]),
        (["--max-steps", 0], ["max_steps 0"]),
        (["--max-prompt-length", 100], ["max_prompt_length 100", "max_length 64"]),
        ([*PADDED, "--batch-size", 6], ["batch_size 6", "4 devices"]),
        (["--accumulation", 3], ["batch_size 8", "accumulation 3"]),
        (
            [*PADDED, "--accumulation", 4],
            ["batch_size 8", "accumulation 4", "4 devices"],
        ),
        (["--mesh.fsdp", 3], ["data=2 x fsdp=3 x tensor=2", "8 device"]),
        (
            ["--mesh.tensor", 8, "--mesh.data", 1, "--mesh.fsdp", 1],
            ["tensor=8", "num_kv_heads"],
        ),
    ],
)
def test_options_out_of_range(inputs, refuse, options, fragments):
    refuse(inputs.train(*options), *fragments)
    assert not (inputs.out / "config.json").exists()  # OUT is still free


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ([], ["--prompts", "--data"]),
        (["--prompts", "a", "--data", "b.jsonl"], ["--prompts", "--data"]),
        (["--prompts", "a", "--max-new-tokens", 500], ["--prompts 1", "128 positions"]),
        (["--prompts", "a", "--max-new-tokens", 0], ["max_new_tokens 0"]),
        (["--prompts", "a", *SHORT, "--batch-size", 3], ["batch of 3 prompts"]),
        (["--prompts", "a", *SHORT, "--top-p", 0], ["top_p"]),
        (["--prompts", "a", *SHORT, "--temperature", -1], ["temperature"]),
    ],
)
def test_sample_options(inputs, refuse, options, fragments):
    argv = ["sample", "--model", inputs.model, *options]
    refuse([str(part) for part in argv], *fragments)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--beta", 0], ["beta 0"]),
        (["--batch-size", 9], ["batch_size 9", "8 devices"]),
        (["--reference", "/none"], ["/none", "no such folder"]),
        (["--out", "/dev/null/out"], ["/dev/null/out"]),
    ],
)
def test_evaluate_options(inputs, refuse, options, fragments):
    given = {"model": inputs.model, "data": inputs.data, "out": inputs.out}
    given |= {option[2:]: value for option, value in zip(options[::2], options[1::2])}
    argv = [part for name, value in given.items() for part in (f"--{name}", value)]
    refuse(["evaluate", *map(str, argv)], *fragments)


@pytest.mark.parametrize("option", ["param_dtype", "compute_dtype"])
def test_float64_where_jax_has_none(inputs, refuse, option):
    refuse(inputs.train(**{option: "float64"}), "JAX_ENABLE_X64=1")


def test_a_bucket_as_out(inputs, refuse):
    refuse(inputs.train(out="gs://bucket/run"), "--out gs://bucket/run", "mount")
    assert not Path("gs:").exists()
