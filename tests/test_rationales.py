"""Rationales as third completions: tokens, flips, the objective, and runs."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import data, losses
from jaxpref.cli.train import config_of
from jaxpref.cli.words import split
from jaxpref.data import DataOptions, InjectOptions, ListSource, make_splits
from jaxpref.data.noise import flip_pairs
from jaxpref.errors import InputError
from jaxpref.objectives import rationale
from jaxpref.train import TrainConfig, read_metrics, run
from tests.answers import one_weight, words, write_records
from tests.data_tokenizers import CHATML, byte_tokenizer

KIND = rationale(losses.dpo).kind
PAIR = {
    "prompt": "q",
    "chosen": " yes",
    "rejected": " no",
    "rationale": " because",
}
QUESTION = "q yes\n\nA worse answer:\n no\n\nWhy the first answer is better:\n"


def splits_of(records, tokenizer, **options):
    options = DataOptions(heldout_fraction=0.0, **options)
    return make_splits(ListSource(records), tokenizer, options, kind=KIND)


def texts_of(dataset, n, tokenizer):
    decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)
    return [
        (decode(dataset.context(n, k)), decode(dataset.completion(n, k)))
        for k in range(3)
    ]


def test_the_rationale_follows_both_answers():
    tokenizer = byte_tokenizer()
    (one,) = [splits_of([PAIR], tokenizer).train]
    expected = [("q", " yes"), ("q", " no"), (QUESTION, " because")]
    assert texts_of(one, 0, tokenizer) == expected
    # Each begins with BOS and ends with EOS, and the prompt is stored once.
    assert one.prompt(0).tolist() == tokenizer("<s>q")["input_ids"]
    assert one.completion(0, 2)[-1] == tokenizer.eos_token_id
    flipped = splits_of([PAIR], tokenizer, inject=InjectOptions(flip_rate=1.0)).train
    assert texts_of(flipped, 0, tokenizer) == [expected[1], expected[0], expected[2]]


def test_in_a_conversation_the_user_asks_for_the_rationale():
    tokenizer = byte_tokenizer(template=CHATML)
    chat = PAIR | {"prompt": [{"role": "user", "content": "q"}]}
    (_, why) = texts_of(splits_of([chat], tokenizer).train, 0, tokenizer)[1:]
    asked = "Here is a worse answer:\n no\n\nWhy is your answer better?"
    assert why[0].count("assistant\n") == 2 and asked in why[0]
    # The template writes a newline after every turn.
    assert "user\nq" in why[0] and why[1].removesuffix("\n") == " because"


@pytest.mark.parametrize("value", [None, "", 3])
def test_a_missing_rationale_is_named(value):
    with pytest.raises(InputError, match="row 1: field 'rationale' must be a text"):
        splits_of([PAIR | {"rationale": value}], byte_tokenizer())


def test_the_loss_is_the_sum_of_both_terms():
    """One weight scales all log-probabilities, so the gradient is known."""
    rng = np.random.default_rng(0)
    logps = -rng.uniform(1, 9, (6, 3))
    reference = -rng.uniform(1, 9, (6, 3))
    objective = rationale(losses.dpo, gamma=0.3)
    grad, _, metrics = one_weight(objective, logps, reference, {})
    h = 0.1 * ((logps - reference)[:, 0] - (logps - reference)[:, 1])
    loss = np.log1p(np.exp(-h)) - 0.3 * logps[:, 2]
    derivative = (
        -0.1 * (logps[:, 0] - logps[:, 1]) / (1 + np.exp(h)) - 0.3 * logps[:, 2]
    )
    # Float32 sums of a few terms.
    assert metrics["loss"] == pytest.approx(loss.mean(), rel=1e-6)
    assert grad == pytest.approx(derivative.mean(), rel=1e-5)
    assert metrics["rationale/nll"] == pytest.approx(-logps[:, 2].mean(), rel=1e-6)
    assert metrics["rewards/margins"] == pytest.approx(h.mean(), rel=1e-5)
    assert jnp.isfinite(grad)


def test_a_flip_leaves_the_rationale():
    pairs = splits_of([PAIR], byte_tokenizer()).train
    flipped = flip_pairs(pairs, np.ones(1, bool))
    order = [1, 0, 2]
    for side, other in enumerate(order):
        assert flipped.context(0, side).tolist() == pairs.context(0, other).tolist()
        assert (
            flipped.completion(0, side).tolist() == pairs.completion(0, other).tolist()
        )
    injected = splits_of([PAIR], byte_tokenizer(), inject=InjectOptions(flip_rate=1.0))
    np.testing.assert_array_equal(flipped.tokens, injected.train.tokens)


def test_what_cannot_have_a_rationale_is_refused():
    for loss in (losses.bradley_terry, losses.dove, losses.ld_dpo, losses.tdpo1):
        with pytest.raises(InputError, match=f"rationale: {loss.__name__} reads"):
            rationale(loss)
    with pytest.raises(InputError, match="gamma -1"):
        rationale(losses.dpo, gamma=-1)
    argv = "--model m --data d --out o --objective rationale --objective.gamma 0.5"
    config = config_of(split(argv.split()))
    assert config.objective.options["gamma"] == 0.5
    assert config.objective.kind.num_completions == 3


def test_a_run_learns_the_rationales(inputs, tmp_path):
    rng = np.random.default_rng(1)
    records = [
        {
            "prompt": words(rng, 2, 5),
            "chosen": " " + words(rng),
            "rejected": " " + words(rng),
            "rationale": " good and warm",
        }
        for _ in range(24)
    ]
    run(
        TrainConfig(
            model=str(inputs / "model"),
            data=str(write_records(tmp_path / "x.jsonl", records)),
            out=str(tmp_path / "run"),
            objective=rationale(losses.dpo, gamma=1.0),
            options=data.DataOptions(max_length=64, heldout_fraction=0.3),
            max_steps=6,
            batch_size=8,
            log_every=1,
        )
    )
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    before, after = [x["eval_rationale/nll"] for x in lines if "eval_loss" in x]
    assert after < before
