"""Greedy answers of a run at its evaluations are those of the exported model."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxpref.data import load_tokenizer, stop_tokens
from jaxpref.data.answer_text import decode_continuation
from jaxpref.errors import InputError
from jaxpref.losses import bradley_terry
from jaxpref.models import Numerics, build
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.lora import LoraOptions
from jaxpref.objectives import from_loss
from jaxpref.report.samples import samples_section
from jaxpref.sampling import generate
from jaxpref.train import OptimizerConfig, read_metrics, run
from jaxpref.train.optimizer import Decay
from jaxpref.train.prepare import prepare
from jaxpref.train.samples import answers_before_training
from tests.test_guard import config_for, inputs  # noqa: F401

run_module = sys.modules["jaxpref.train.run"]  # `jaxpref.train.run` is the function


@pytest.mark.parametrize(
    "lora",
    [
        pytest.param(LoraOptions(), id="full", marks=pytest.mark.slow),
        pytest.param(LoraOptions(rank=2), id="lora"),
    ],
)
def test_answers_are_those_of_the_exported_model(inputs, tmp_path, lora):  # noqa: F811
    options = dict(
        eval_every=2,
        max_steps=3,
        eval_samples=3,
        eval_sample_tokens=6,
        lora=lora,
        optimizer=OptimizerConfig(learning_rate=1e-3, decay=Decay.CONSTANT),
    )
    run(config_for(inputs, tmp_path, **options))
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [x["step"] for x in found] == [0] * 3 + [2] * 3 + [3] * 3
    assert len({x["id"] for x in found}) == len({x["prompt"] for x in found}) == 3
    folder = tmp_path / "export"
    model = build(read_architecture(folder), Numerics())
    params, tokenizer = load_params(folder, model), load_tokenizer(folder)
    heldout = prepare(config_for(inputs, tmp_path)).datasets.splits.heldout
    prompts = {str(id): heldout.prompt(n).tolist() for n, id in enumerate(heldout.ids)}
    for x in found[-3:]:
        prompt = prompts[x["id"]]
        answer = generate(
            model,
            params,
            jnp.asarray([prompt]),
            jnp.asarray([len(prompt)]),
            jax.random.key(1),
            max_new_tokens=6,
            temperature=0.0,
            stop_tokens=stop_tokens(tokenizer),
        )
        new = answer.tokens[0, : answer.counts[0]].tolist()
        assert x["output"] == decode_continuation(tokenizer, prompt, new)
        assert abs(x["logp"] - float(answer.logps[0])) < 1e-4
        assert x["ended"] == bool(answer.ended[0])
    # A resumed run writes the lines from its step on again, and no others.
    (tmp_path / "samples.jsonl").write_text("\n".join([*lines, '{"step": ']))
    run(config_for(inputs, tmp_path, **options | {"max_steps": 4}))
    again = [json.loads(x) for x in (tmp_path / "samples.jsonl").open()]
    assert [x["step"] for x in again] == [0] * 3 + [2] * 3 + [4] * 3
    # The answers before training, one sequence alone, under the last weights.
    params, expected = load_params(folder, model), []
    for x in again[:3]:
        prompt = prompts[x["id"]]
        logits = model.logits(params, jnp.asarray([prompt + x["tokens"]]))[0]
        before = scipy.special.log_softmax(np.asarray(logits, float), axis=-1)
        places = len(prompt) - 1 + np.arange(len(x["tokens"]))
        expected.append(before[places, x["tokens"]].sum())
    logged = [x["eval_logps/unseen"] for x in evaluations(tmp_path)]
    assert len(logged) == 3 and logged[0] != logged[2]
    assert logged[0] == pytest.approx(np.mean([x["logp"] for x in again[:3]]), rel=1e-4)
    assert logged[2] == pytest.approx(np.mean(expected), rel=1e-4)


def test_answers_before_training_are_those_of_step_0_to_the_same_prompts():
    line = lambda step, id, tokens: {"step": step, "id": id, "tokens": tokens}
    lines = [line(0, "a", [5, 6]), line(0, "b", [7, 8, 9]), line(2, "c", [4])]
    found = answers_before_training([*lines, {"step": 0}], ["c", "a", "b"], 2)
    np.testing.assert_array_equal(found, [[-1, -1], [5, 6], [-1, -1]])


def evaluations(out):
    return [x for x in read_metrics(out / "metrics.jsonl") if "eval_loss" in x]


def test_answers_that_may_be_too_long_are_refused_at_once(
    inputs,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(run_module, "_begin", None)  # where the reference scores
    options = {"eval_samples": 3, "eval_sample_tokens": 500}
    with pytest.raises(InputError, match="--eval-sample-tokens 500: with the longest"):
        run(config_for(inputs, tmp_path, **options))


def test_a_reward_model_writes_no_text(inputs, tmp_path):  # noqa: F811
    objective = from_loss(bradley_terry)
    with pytest.raises(InputError, match="--eval-samples 2: bradley_terry trains a"):
        config_for(inputs, tmp_path, eval_samples=2, objective=objective)


def test_the_report_shows_answers_side_by_side(tmp_path):
    path = tmp_path / "samples.jsonl"
    assert samples_section(path) is None
    lines = [
        {"step": step, "id": id, "prompt": "ask\u2028" + id, "output": f"<{id}{step}>"}
        | {"logp": -step / 2, "ended": step < 4}
        for step in range(5)
        for id in "ab"
    ]
    encode = lambda line: json.dumps(line, ensure_ascii=False)
    text = "".join(encode(line) + "\n" for line in lines)
    path.write_text(text + '{"step": ')  # killed
    section = samples_section(path)
    assert section is not None
    _, first, second = section.parts
    assert (first.above, second.above) == ("ask\u2028a", "ask\u2028b")
    assert second.columns == [
        ("Step 0 (0.0)", "<b0>"),
        ("Step 2 (-1.0)", "<b2>"),
        ("Step 4 (-2.0, cut)", "<b4>"),
    ]
    path.write_text("{}\n" + text)
    with pytest.raises(InputError, match="line 1"):
        samples_section(path)
