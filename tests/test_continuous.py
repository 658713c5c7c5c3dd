"""`answer_all`: slots that are refilled give the answers of one prompt at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.errors import InputError
from jaxpref.evaluate import on_policy
from jaxpref.models import Numerics, build
from jaxpref.models.low_rank import LowRank
from jaxpref.models.soft_prompt import PROMPT, with_placeholders
from jaxpref.runtime.mesh import MeshConfig, make_mesh
from jaxpref.sampling import Request, Rule, answer_all, continuous, generate, pad
from jaxpref.sampling.selection import likely_sample
from jaxpref.scoring import make_scorer
from tests.test_models import mesh
from tests.test_sampling import CONFIG, PARAMS

WINDOWS = dataclasses.replace(
    CONFIG, sliding_window=5, sliding_layers=(True, False), logit_soft_cap=8.0
)
MODEL = build(WINDOWS)
STOPS = (2, 3)
RNG = np.random.default_rng(0)
REQUESTS = [
    Request(RNG.integers(4, 16, n).tolist(), (number, 0), int(RNG.integers(1, 25)))
    for number, n in enumerate(RNG.integers(1, 40, 15))
]
"""Prompts of two widths, with limits of their own; their texts outgrow two lengths of
the cache."""


@pytest.fixture(autouse=True)
def short_cache(monkeypatch):
    monkeypatch.setattr(continuous, "SHORTEST", 32)


def rule(top_k):
    """The most likely token if `top_k` is 1; the program is the same."""
    select = likely_sample(1.0, top_k, 1.0)
    return Rule(jax.random.key(5), select, jnp.array(STOPS, jnp.int32))


def answers(requests, top_k, batch_size, params=PARAMS):
    found = list(
        answer_all(MODEL, params, requests, rule(top_k), batch_size=batch_size)
    )
    assert sorted(number for number, _ in found) == list(range(len(requests)))
    return [answer for _, answer in sorted(found)]


@jax.jit
def log_probs(tokens):
    """Without a cache."""
    return jax.nn.log_softmax(MODEL.logits(PARAMS, tokens))


def test_greedy_answers_are_the_argmax_of_whole_texts():
    texts = np.zeros((len(REQUESTS), 64), np.int32)
    lengths = np.array([len(request.tokens) for request in REQUESTS])
    for row, request in enumerate(REQUESTS):
        texts[row, : lengths[row]] = request.tokens
    rows, expected, sums = np.arange(len(REQUESTS)), [], 0
    for step in range(max(request.max_new_tokens for request in REQUESTS)):
        table = np.asarray(log_probs(texts))[rows, lengths + step - 1]
        texts[rows, lengths + step] = np.argmax(table, axis=-1)
        expected.append(np.argmax(table, axis=-1))
        sums = sums + np.max(table, axis=-1)
        expected[-1] = list(zip(expected[-1].tolist(), np.asarray(sums).tolist()))
    found = answers(REQUESTS, 1, 4)
    for row, (request, answer) in enumerate(zip(REQUESTS, found, strict=True)):
        tokens = [step[row][0] for step in expected[: request.max_new_tokens]]
        ends = [n for n, token in enumerate(tokens) if token in STOPS]
        count = ends[0] + 1 if ends else len(tokens)
        assert answer.tokens == tokens[:count] and answer.ended == bool(ends)
        # At most 25 float32 terms of size 3, each rounded.
        assert answer.logp == pytest.approx(expected[count - 1][row][1], abs=1e-4)
    assert len({len(answer.tokens) for answer in found}) > 5  # slots were refilled


SAMPLES = [
    Request(request.tokens, (number, sample), request.max_new_tokens)
    for number, request in enumerate(REQUESTS[:6])
    for sample in range(3)
]
"""Three samples of each prompt."""


def test_tokens_depend_on_seed_prompt_and_sample_alone():
    expected = answers(SAMPLES, 16, 4)
    order = np.random.default_rng(1).permutation(len(SAMPLES))
    found = answers([SAMPLES[n] for n in order], 16, 7)
    for n, answer in zip(order, found, strict=True):
        assert answer.tokens == expected[n].tokens
        assert answer.ended == expected[n].ended
        assert answer.logp == pytest.approx(expected[n].logp, abs=1e-4)
    samples = [tuple(answer.tokens) for answer in expected]
    assert all(len(set(samples[n : n + 3])) > 1 for n in (0, 3, 6))
    # A batch of `generate` is the first sample of each prompt.
    prompts, lengths = pad([request.tokens for request in REQUESTS[:6]])
    options = dict(max_new_tokens=24, top_k=16, top_p=1.0, stop_tokens=STOPS)
    batch = generate(MODEL, PARAMS, prompts, lengths, rule(1).key, **options)
    for row, (request, answer) in enumerate(zip(REQUESTS, expected[::3])):
        count = min(int(batch.counts[row]), request.max_new_tokens)
        assert batch.tokens[row, :count].tolist() == answer.tokens


def test_samples_of_a_prompt_share_its_computation(monkeypatch):
    computed = []

    def start(model, params, rule, prompts, *args, **kwargs):
        computed.append(prompts.shape[0])
        return run(model, params, rule, prompts, *args, **kwargs)

    run = continuous._start
    monkeypatch.setattr(continuous, "_start", start)
    # Three answers start together, and their prompt is computed once.
    found = answers(SAMPLES, 16, 24)
    assert computed == [1] * 6
    for answer, alone in zip(found, answers(SAMPLES, 16, 4), strict=True):
        assert answer.tokens == alone.tokens
        assert answer.logp == pytest.approx(alone.logp, abs=1e-4)


def test_log_probs_are_those_of_the_scorer():
    found = answers(REQUESTS, 16, 4)
    compute = on_policy.Compute(
        mesh=make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1]),
        batch_size=8,
        numerics=Numerics(),
    )
    with jax.set_mesh(compute.mesh):
        scores = on_policy._score(
            make_scorer(MODEL, frozenset({"policy_logps"})),
            PARAMS,
            None,
            on_policy._dataset(
                [request.tokens for request in REQUESTS],
                [answer.tokens for answer in found],
            ),
            longest=64,
            answer=24,
            compute=compute,
            title="scores",
        )
    logps = [answer.logp for answer in found]
    np.testing.assert_allclose(logps, scores["policy_logps"][:, 0], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_mesh_gives_the_same_answers():
    expected = answers(REQUESTS, 16, 4)
    with mesh(2, 2, 2):
        params = jax.jit(MODEL.init)(jax.random.key(0))
        found = answers(REQUESTS, 16, 4, params)
        with pytest.raises(InputError, match="multiple of the 4 devices"):
            answers(REQUESTS, 16, 6, params)
    assert [x.tokens for x in found] == [x.tokens for x in expected]
    samples = SAMPLES[:12]
    expected += answers(samples, 16, 32)
    with mesh(2, 1, 2):
        params = jax.jit(MODEL.init)(jax.random.key(0))
        found += answers(samples, 16, 32, params)  # two prompts for four answers
    assert [x.tokens for x in found] == [x.tokens for x in expected]
    logps = [[answer.logp for answer in some] for some in (found, expected)]
    np.testing.assert_allclose(*logps, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_adapters_are_their_product():
    layers, keys = PARAMS["layers"], jax.random.split(jax.random.key(1), 2)
    weight = layers["query"]  # [L, D, H, K]
    a = jax.random.normal(keys[0], (*weight.shape[:2], 2))
    b = jax.random.normal(keys[1], (weight.shape[0], 2, *weight.shape[2:]))
    merged = weight + 0.5 * jnp.einsum("ldr,lrhk->ldhk", a, b)
    requests = REQUESTS[:4]
    found, expected = (
        answers(requests, 1, 4, PARAMS | {"layers": layers | {"query": query}})
        for query in (LowRank(weight, a, b, 0.5), merged)
    )
    assert [x.tokens for x in found] == [x.tokens for x in expected]


def test_answers_after_a_soft_prompt_have_the_log_probs_of_whole_texts():
    """One that is longer than the window; two samples of each prompt, of refilled
    slots."""
    n, size = 7, CONFIG.hidden_size
    prompt = jax.random.normal(jax.random.key(2), (n, size))
    params = PARAMS | {PROMPT: prompt}
    texts = [with_placeholders(list(request.tokens), n) for request in REQUESTS[:4]]
    requests = [Request(t, (i, s), 9) for i, t in enumerate(texts) for s in (0, 1)]
    found = answers(requests, 16, 4, params)
    assert found[0].tokens != found[1].tokens
    rows = [[*x.tokens, *y.tokens] for x, y in zip(requests, found, strict=True)]
    tokens, _ = pad(rows, 64)
    logps = jax.nn.log_softmax(jax.jit(MODEL.logits)(params, tokens))
    for row, request, answer in zip(logps, requests, found, strict=True):
        places = len(request.tokens) - 1 + np.arange(len(answer.tokens))
        expected = row[places, np.array(answer.tokens)].sum()
        assert answer.logp == pytest.approx(float(expected), abs=1e-4)
        ends = [token in STOPS for token in answer.tokens]
        assert answer.ended == ends[-1] and not any(ends[:-1])
        assert answer.ended or len(answer.tokens) == 9


def test_a_request_that_cannot_be_answered_is_named():
    for tokens, most, words in [
        ([], 1, "prompt 1 is empty"),
        ([4], 0, "prompt 1 is 0"),
    ]:
        requests = [Request(tokens, (0, 0), most)]
        with pytest.raises(InputError, match=words):
            answers(requests, 1, 1)
    assert answers([], 1, 1) == []
