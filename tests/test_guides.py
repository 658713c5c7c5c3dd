"""Guided decoding: the mixture of models, against the logits of whole texts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from benchmarks import guides
from jaxpref.models import build
from jaxpref.sampling import Mixed, Mixture, Request, Rule, answer_all, continuous
from jaxpref.sampling.mixture import mix, next_logits
from jaxpref.sampling.selection import likely_sample
from jaxpref.sampling.slots import prepare
from tests.compiled import compiled
from tests.test_models import mesh
from tests.test_sampling import CONFIG
from tests.tiny import make_model_folder

GUIDE = dataclasses.replace(CONFIG, hidden_size=12, num_layers=1, num_kv_heads=1)
WINDOWED = dataclasses.replace(CONFIG, sliding_window=5, sliding_layers=(True, False))
MODELS = build(CONFIG), build(GUIDE), build(WINDOWED)
PARAMS = tuple(jax.jit(model.init)(jax.random.key(n)) for n, model in enumerate(MODELS))
WEIGHTS = 1.0, 0.7, -0.4
MIXTURE = Mixture(MODELS)
MIXED = Mixed(PARAMS, jnp.array(WEIGHTS), jnp.float32(0))
LOGITS = [jax.jit(model.logits) for model in MODELS]
RNG = np.random.default_rng(0)


def log_probs(texts) -> list[np.ndarray]:
    """Of every model, for the token after each of its texts, without a cache."""
    found = []
    for logits, params, text in zip(LOGITS, PARAMS, texts, strict=True):
        row = jnp.array([[*text, *[0] * (32 - len(text))]])
        z = np.asarray(logits(params, row), np.float64)[0, len(text) - 1]
        found.append(scipy.special.log_softmax(z))
    return found


def mixed_log_probs(texts, weights=WEIGHTS, min_p=0.0) -> np.ndarray:
    """By the definition."""
    each = log_probs(texts)
    mixed = sum(w * log_p for w, log_p in zip(weights, each, strict=True))
    own = np.exp(each[0])
    return scipy.special.log_softmax(np.where(own >= min_p * own.max(), mixed, -np.inf))


def requests(count: int, *, own_prompts: bool) -> list[Request]:
    draw = lambda: RNG.integers(4, 16, RNG.integers(1, 12)).tolist()
    return [
        Request(draw(), (n, 0), 6, (draw(), draw()) if own_prompts else ())
        for n in range(count)
    ]


@pytest.mark.parametrize("min_p", [0.0, 0.3])
def test_the_next_token_has_the_distribution_of_the_mixture(min_p):
    prompts = [[3, 5], [1, 2, 9, 8], [7]]
    params = prepare(MIXTURE, MIXED._replace(min_p=jnp.float32(min_p)))
    arrays = [jnp.array([prompt]) for prompt in prompts]
    lengths = tuple(jnp.array([len(prompt)]) for prompt in prompts)
    width = lambda x: jnp.pad(x, ((0, 0), (0, 6 - x.shape[1])))
    prefill, decode = jax.jit(MIXTURE.prefill), jax.jit(MIXTURE.decode)
    hidden, cache = prefill(params, tuple(map(width, arrays)), lengths)
    for token in (11, 4):
        logits, own = next_logits(MIXTURE, params, hidden)
        found, expected = (
            jax.nn.softmax(logits)[0],
            mixed_log_probs(prompts, min_p=min_p),
        )
        # Float32 logits of size 10.
        np.testing.assert_allclose(found, np.exp(expected), atol=1e-5)
        np.testing.assert_array_equal(found > 0, expected > -np.inf)
        alone = jax.nn.log_softmax(own)[0]
        np.testing.assert_allclose(alone, log_probs(prompts)[0], atol=1e-5)
        tokens, active = jnp.array([token]), jnp.array([True])
        hidden, cache = decode(params, tokens, cache, active)
        prompts = [[*prompt, token] for prompt in prompts]


def answers(asked, model, params, *, top_k=1, batch_size=3):
    rule = Rule(jax.random.key(5), likely_sample(1.0, top_k, 1.0), jnp.array([2, 3]))
    found = answer_all(model, params, asked, rule, batch_size=batch_size)
    return [answer for _, answer in sorted(found)]


@pytest.mark.parametrize("own_prompts", [False, True])
def test_guided_answers_are_the_argmax_of_whole_texts(own_prompts, monkeypatch):
    """Slots are refilled, and guides have prompts of other lengths."""
    monkeypatch.setattr(continuous, "SHORTEST", 16)
    asked = requests(7, own_prompts=own_prompts)
    for request, answer in zip(asked, answers(asked, MIXTURE, MIXED), strict=True):
        texts = request.texts if own_prompts else request.texts * 3
        logp, tokens = 0.0, []
        while len(tokens) < 6 and not ({2, 3} & {*tokens}):
            now = [[*text, *tokens] for text in texts]
            tokens.append(int(np.argmax(mixed_log_probs(now))))
            logp += log_probs(now)[0][tokens[-1]]
        assert answer.tokens == tokens
        # Of the model alone; six float32 terms.
        assert answer.logp == pytest.approx(logp, abs=1e-4)
        assert sum(answer.token_logps) == pytest.approx(logp, abs=1e-4)


def test_a_guide_of_weight_0_changes_nothing():
    asked = requests(5, own_prompts=False)
    alone = answers(asked, MODELS[0], PARAMS[0], top_k=16)
    with_guide = Mixed(PARAMS[:2], jnp.array([1.0, 0.0]))
    found = answers(asked, Mixture(MODELS[:2]), with_guide, top_k=16)
    assert [x.tokens for x in found] == [x.tokens for x in alone]


@pytest.mark.slow
def test_draws_do_not_depend_on_the_number_of_slots():
    asked = requests(7, own_prompts=True)
    expected = answers(asked, MIXTURE, MIXED, top_k=16)
    found = answers(asked, MIXTURE, MIXED, top_k=16, batch_size=5)
    assert [x.tokens for x in found] == [x.tokens for x in expected]


@pytest.mark.slow
def test_every_mesh_draws_the_same():
    architectures = [model.architecture for model in MODELS]
    even = [
        dataclasses.replace(a, hidden_size=8, num_kv_heads=2) for a in architectures
    ]
    models = tuple(map(build, even))
    mixture, asked = Mixture(models), requests(7, own_prompts=True)

    def run():
        init = lambda n: jax.jit(models[n].init)(jax.random.key(n))
        params = Mixed(tuple(map(init, range(3))), jnp.array(WEIGHTS))
        return answers(asked, mixture, params, top_k=16, batch_size=4)

    expected = run()
    with mesh(2, 2, 2):
        found = run()
    assert [x.tokens for x in found] == [x.tokens for x in expected]


def test_weights_are_data():
    of = lambda weight: Mixed(PARAMS[:2], jnp.array([1.0, weight]), jnp.float32(0.1))
    asked, mixture = requests(1, own_prompts=False), Mixture(MODELS[:2])
    answers(asked, mixture, of(0.5))
    with compiled("advance") as programs:
        answers(asked, mixture, of(1.5))
    assert not programs


def test_a_token_that_a_model_lacks_is_not_allowed():
    found = mix([jnp.zeros((1, 5)), jnp.zeros((1, 3))], jnp.ones(2))
    np.testing.assert_array_equal(found, [[0, 0, 0, -np.inf, -np.inf]])


@pytest.mark.slow
def test_the_benchmark_samples_the_same_tokens_with_guides(tmp_path):
    model, out = make_model_folder(tmp_path / "model"), tmp_path / "x.json"
    sizes = dict(guides=1, prompts=8, new_tokens=4, batch_size=8, rounds=1)
    guides.main(guides.Options(model=str(model), json=str(out), **sizes))
    found = json.loads(out.read_text())["guides"]
    assert [*found] == ["0", "1"] and all(x["same"] for x in found.values())
    assert all(x["tokens_per_cpu_second"] > 0 for x in found.values())
