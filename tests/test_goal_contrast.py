"""`--objective goal_contrast`: a contrast of hidden states of both answers."""

import dataclasses
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import losses
from jaxpref.cli.train import config_of
from jaxpref.cli.words import split
from jaxpref.errors import InputError
from jaxpref.models import RewardModel
from jaxpref.models.lora import LoraOptions
from jaxpref.models.weights import Weights
from jaxpref.objectives import from_loss, goal_contrast
from jaxpref.objectives.inputs import Inputs
from jaxpref.scoring import make_scorer
from jaxpref.scoring.goal_states import goal_places
from jaxpref.scoring.partition import Trained, in_training
from jaxpref.scoring.scores import ends
from jaxpref.train import read_metrics, run
from tests.test_packing import make_pairs, packed, padded
from tests.tiny import make_model_folder, make_pairs_file, tiny_config, tiny_params

OBJECTIVE = goal_contrast(losses.bradley_terry, beta=0.25, samples=4)


def contrast(h, goal, rejected):
    """In float64, written out."""
    h, goal, rejected = (np.asarray(x, np.float64) for x in (h, goal, rejected))
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    reached = lambda to: (1 / (1 + np.exp(-(unit(h) * unit(to)).sum(-1)))).mean(-1)
    return -np.log(reached(goal)) - np.log(1 - reached(rejected))


def test_the_contrast_is_that_of_cosines():
    rng = np.random.default_rng(0)
    states = jnp.asarray(rng.normal(size=(3, 5, 4, 8)), jnp.float32)
    found = losses.goal_contrast(*states)
    np.testing.assert_allclose(found, contrast(*states), rtol=1e-6)
    # Only directions count.
    scaled = losses.goal_contrast(states[0] * 9, states[1] / 3, states[2])
    np.testing.assert_allclose(found, scaled, rtol=1e-5)
    # Moving the sources toward the goals, and away from the others, helps.
    closer = losses.goal_contrast(states[0] + states[1] - states[2], *states[1:])
    assert (closer < found).all()
    blank = jax.grad(lambda x: losses.goal_contrast(x, x, x).sum())(jnp.zeros((2, 3)))
    np.testing.assert_array_equal(blank, 0)
    with pytest.raises(ValueError, match="one shape"):
        inspect.unwrap(losses.goal_contrast)(states[0], states[1, :1], states[2])


@pytest.fixture(scope="module")
def scored():
    """The scores of the same pairs in both layouts, at the same step."""
    model, pairs = RewardModel(tiny_config()), make_pairs(24)
    params = tiny_params(model)
    scorer = make_scorer(model, OBJECTIVE.scores, heads=OBJECTIVE.heads)
    score = jax.jit(lambda read, micro: scorer(params, read, micro).scores)
    batches = {}
    batches["packed"], held = packed(pairs)
    batches["padded"] = padded(pairs, held)
    read = in_training({}, jnp.int32(3))
    found = {}
    for name, batch in batches.items():
        micro = jax.tree.map(lambda x: x[0], batch)
        found[name] = micro, score(read, micro), score({}, micro)
    return model, params, pairs, held, found


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_states_are_those_of_tokens_of_the_answer_in_order(layout, scored):
    model, params, pairs, _, found = scored
    micro, scores, untrained = found[layout]
    assert untrained.keys() == {"rewards"}  # states are for train steps only
    np.testing.assert_array_equal(untrained["rewards"], scores["rewards"])
    hidden, seen = jax.jit(model.hidden), set()
    for place, n in np.ndenumerate(np.asarray(micro.pair_index)):
        if n < 0:
            continue
        for side in (0, 1):
            text = [*pairs.prompt(n), *pairs.completion(n, side)]
            row = jnp.zeros((1, 32), jnp.int32).at[0, : len(text)].set(jnp.array(text))
            states = np.asarray(hidden(params, row))[0, : len(text)]
            answer = states[len(pairs.prompt(n)) :]

            def token(state, answer=answer):
                away = np.abs(answer - state).max(-1)
                assert away.min() < 1e-4  # it is one of the answer's
                return away.argmin()

            own = [
                [token(x) for x in scores[name][*place, side]]
                for name in ("source_states", "goal_states")
            ]
            if len({*map(tuple, np.round(answer, 3))}) == len(answer):
                later = np.array(own[1]) - own[0]
                assert (later > 0).all() or (len(answer) == 1 and not later.any())
            seen |= {(len(answer), x) for x in (*own[0], *own[1])}
    # Short answers are covered from the first to the last token.
    assert {(3, 0), (3, 2), (4, 0), (4, 3)} <= seen


def test_layouts_and_steps(scored):
    """The same draws in each layout; others in another step."""
    model, params, _, held, found = scored
    losses_of = {}
    for name, (micro, scores, _) in found.items():
        values = OBJECTIVE.losses(Inputs(scores, micro), {})
        flat = np.asarray(micro.pair_index).ravel()
        losses_of[name] = dict(zip(flat.tolist(), np.asarray(values).ravel()))
    padded_losses = [losses_of["padded"][n] for n in held.tolist()]
    packed_losses = [losses_of["packed"][n] for n in held.tolist()]
    np.testing.assert_allclose(packed_losses, padded_losses, rtol=1e-4)
    micro, scores, _ = found["padded"]
    plain = from_loss(losses.bradley_terry).losses(Inputs(scores, micro), {})
    expected = contrast(
        scores["source_states"][:, :, 0],
        scores["goal_states"][:, :, 0],
        scores["goal_states"][:, :, 1],
    )
    total = OBJECTIVE.losses(Inputs(scores, micro), {})
    np.testing.assert_allclose(total - plain, 0.25 * expected, rtol=1e-4)
    scorer = make_scorer(model, OBJECTIVE.scores, heads=OBJECTIVE.heads)
    other = scorer(params, in_training({}, jnp.int32(4)), micro).scores
    assert not np.allclose(other["goal_states"], scores["goal_states"])
    np.testing.assert_allclose(other["rewards"], scores["rewards"], atol=1e-6)


def test_draws_are_uniform_over_two_tokens_in_order(scored):
    micro = scored[-1]["padded"][0]
    lasts = ends(micro)
    lengths = np.asarray(micro.completion_lengths).ravel()

    def drawn(seed, micro=micro):
        places = goal_places(micro, lasts, jnp.int32(3), count=512, seed=seed)
        back = np.asarray(lasts).ravel()[:, None] - np.asarray(places).reshape(
            len(lengths), -1
        )
        return (lengths[:, None] - 1 - back).reshape(len(lengths), 512, 2)

    places = drawn(5)
    for length, (source, goal) in zip(lengths, places.transpose(0, 2, 1)):
        if length < 2:
            continue
        assert (source >= 0).all() and (source < goal).all() and (goal < length).all()
        found = np.histogram(source * length + goal, bins=np.arange(length**2 + 1))[0]
        every = [i * length + j for i in range(length) for j in range(i + 1, length)]
        share = 1 / len(every)
        error = np.sqrt(share * (1 - share) / 512)
        np.testing.assert_allclose(found[every] / 512, share, atol=5 * error)
    assert (lengths >= 2).sum() > 4
    np.testing.assert_array_equal(drawn(5), places)
    assert (drawn(6) != places).any()
    ones = dataclasses.replace(
        micro, completion_lengths=jnp.minimum(micro.completion_lengths, 1)
    )
    expected = np.maximum(np.asarray(lasts), 0).ravel()
    found = goal_places(ones, lasts, jnp.int32(3), count=2, seed=5)
    np.testing.assert_array_equal(found, expected.repeat(4).reshape(found.shape))


@pytest.mark.parametrize("lora", [LoraOptions(), LoraOptions(rank=1)])
def test_the_seed_of_a_run_is_that_of_the_draws(lora):
    model = RewardModel(tiny_config())
    trained = Trained(start=Weights(Path()), lora=lora, seed=7)
    scorer = make_scorer(
        model, OBJECTIVE.scores, heads=OBJECTIVE.heads, trained=trained
    )
    assert getattr(scorer, "one", scorer).seed == 7


def test_adapters_see_the_states_of_the_model(scored):
    """New ones, which change nothing."""
    model, params, _, _, found = scored
    micro, expected, _ = found["padded"]
    lora = Trained(start=Weights(Path()), lora=LoraOptions(rank=1, targets="q_proj"))
    scorer = make_scorer(model, OBJECTIVE.scores, heads=OBJECTIVE.heads, trained=lora)
    part = scorer.partition
    frozen = in_training({"base": part.frozen(params)}, jnp.int32(3))
    own = part.trained(params, model, jax.random.key(0))
    scores = jax.jit(lambda own, micro: scorer(own, frozen, micro).scores)(own, micro)
    assert scores.keys() == expected.keys()
    for name in ("source_states", "goal_states"):
        np.testing.assert_allclose(scores[name], expected[name], atol=1e-5)


def test_a_run_lowers_the_contrast(tmp_path):
    model = make_model_folder(tmp_path / "model")
    pairs = make_pairs_file(tmp_path / "pairs.jsonl", 24)
    argv = f"--model {model} --data {pairs} --loss bradley_terry --max-steps 8"
    argv += " --objective goal_contrast --objective.beta 1 --batch-size 8"
    argv += " --max-length 64 --log-every 1 --learning-rate 1e-2 --row-length 64"
    run(config_of(split(f"{argv} --out {tmp_path / 'out'}".split())))
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    contrasts = [x[name] for x in lines if (name := "goal_contrast/loss") in x]
    assert contrasts[0] == pytest.approx(2 * np.log(2), abs=0.2)
    assert np.mean(contrasts[-3:]) < contrasts[0] - 0.05


def test_what_it_cannot_wrap_is_refused():
    with pytest.raises(InputError, match="dpo trains no reward model; use a loss"):
        goal_contrast(losses.dpo)
    with pytest.raises(InputError, match="samples 0: beta must be"):
        goal_contrast(losses.bradley_terry, samples=0)
