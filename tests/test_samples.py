"""Greedy answers of a run at its evaluations are those of the exported model."""

import json

import jax
import jax.numpy as jnp
import pytest

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
from jaxpref.train import OptimizerConfig, run
from jaxpref.train.optimizer import Decay
from jaxpref.train.prepare import prepare
from tests.test_guard import config_for, inputs  # noqa: F401


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
    steps = [json.loads(x)["step"] for x in (tmp_path / "samples.jsonl").open()]
    assert steps == [0] * 3 + [2] * 3 + [4] * 3


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
