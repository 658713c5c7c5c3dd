"""The sampler: its distribution, its padding, its stopping and its one compile."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxpref.errors import InputError
from jaxpref.models import Numerics, build
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.sampling import generate, pad, selection

CONFIG = LlamaArchitecture(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    initializer_range=0.6,
)
MODEL = build(CONFIG)
PARAMS = MODEL.init(jax.random.key(0))
LOGITS = jax.jit(MODEL.logits)
PROMPTS = [[3], [5, 1, 2], [4, 4, 9, 8, 7], [1, 2]]


def numpy_distribution(logits, temperature, top_k, top_p):
    """Probabilities by the definition, one token at a time; no ties are expected."""
    p = np.exp(np.asarray(logits, np.float64) / temperature)
    p /= p.sum()
    by_likelihood = sorted(range(len(p)), key=lambda token: -p[token])
    kept = by_likelihood[: top_k or len(p)]
    total, nucleus = sum(p[token] for token in kept), []
    for token in kept:
        nucleus.append(token)
        if sum(p[t] for t in nucleus) / total >= top_p:
            break
    out = np.zeros(len(p))
    out[nucleus] = p[nucleus]
    return out / out.sum()


FILTERS = [
    (1.0, None, 1.0),
    (0.7, 3, 1.0),
    (1.3, None, 0.6),
    (0.8, 6, 0.8),
    (1.0, 1, 1.0),
]


@pytest.mark.parametrize("temperature, top_k, top_p", FILTERS)
def test_filters_keep_what_the_definition_keeps(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32) * 2
    kept = selection.filter_likely(
        jnp.asarray(logits / temperature), top_k or 16, top_p
    )
    expected = np.stack(
        [numpy_distribution(z, temperature, top_k, top_p) for z in logits]
    )
    np.testing.assert_allclose(jax.nn.softmax(kept), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(np.isfinite(kept), expected > 0)


@pytest.mark.parametrize("top_k", [3000, 4095, 4096])
def test_top_p_of_one_cuts_nothing_of_a_large_vocabulary(top_k):
    """The float32 sum of the others' probabilities reaches 1 before the last token."""
    logits = np.linspace(0, 16, 4096, dtype=np.float32)[None]
    kept = selection.filter_likely(jnp.asarray(logits), top_k, jnp.float32(1))
    np.testing.assert_array_equal(np.isfinite(kept)[0], np.arange(4096) >= 4096 - top_k)


@pytest.mark.parametrize("temperature, top_k, top_p", FILTERS)
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    rows = 2048
    prompts, lengths = pad([PROMPTS[2]] * rows)
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    key = jax.random.key(7)
    tokens, *_ = generate(
        MODEL, PARAMS, prompts, lengths, key, max_new_tokens=2, **options
    )
    first = np.bincount(tokens[:, 0], minlength=16) / rows
    logits = MODEL.logits(PARAMS, jnp.array([PROMPTS[2]]))[0, -1]
    expected = numpy_distribution(logits, temperature, top_k, top_p)
    # Five standard deviations of a share, and never a token that was cut.
    assert np.all(np.abs(first - expected) <= 5 * np.sqrt(expected / rows))
    likely = int(np.argmax(first))
    second = np.asarray(tokens[:, 1])[np.asarray(tokens[:, 0]) == likely]
    logits = MODEL.logits(PARAMS, jnp.array([[*PROMPTS[2], likely]]))[0, -1]
    expected = numpy_distribution(logits, temperature, top_k, top_p)
    share = np.bincount(second, minlength=16) / len(second)
    assert np.all(np.abs(share - expected) <= 5 * np.sqrt(expected / len(second)))


def greedy_by_hand(prompt, steps):
    sequence = list(prompt)
    for _ in range(steps):
        row = sequence + [0] * (12 - len(sequence))  # one shape; the rest is not seen
        logits = LOGITS(PARAMS, jnp.array([row]))[0, len(sequence) - 1]
        sequence.append(int(jnp.argmax(logits)))
    return sequence[len(prompt) :]


def test_greedy_is_the_likeliest_token_whatever_the_padding():
    prompts, lengths = pad(PROMPTS)
    np.testing.assert_array_equal(prompts[0], [3, 0, 0, 0, 0])
    np.testing.assert_array_equal(lengths, [1, 3, 5, 2])
    wider, _ = pad(PROMPTS, 8)
    for tokens in (prompts, wider):
        out, counts, *_ = generate(
            MODEL,
            PARAMS,
            tokens,
            lengths,
            jax.random.key(0),
            max_new_tokens=6,
            temperature=0,
        )
        assert out.dtype == jnp.int32 and counts.tolist() == [6] * 4
        assert out.tolist() == [greedy_by_hand(prompt, 6) for prompt in PROMPTS]


def test_a_row_ends_with_its_first_stop_token():
    prompts, lengths = pad(PROMPTS)
    free = np.array([greedy_by_hand(prompt, 6) for prompt in PROMPTS])
    stops = (int(free[0, 1]), int(free[1, 2]))
    out, counts, *_ = generate(
        MODEL,
        PARAMS,
        prompts,
        lengths,
        jax.random.key(0),
        max_new_tokens=6,
        temperature=0,
        stop_tokens=stops,
    )
    for row, found, n in zip(free, np.asarray(out), np.asarray(counts), strict=True):
        hits = np.flatnonzero(np.isin(row, stops))
        expected = int(hits[0]) + 1 if len(hits) else 6
        assert n == expected
        np.testing.assert_array_equal(found, [*row[:n], *[0] * (6 - n)])
    assert min(counts.tolist()) < 6


def test_the_loop_ends_when_every_row_has_stopped(monkeypatch):
    steps = []
    decode = type(MODEL).decode

    def counting(self, *args):
        jax.debug.callback(lambda: steps.append(1))
        return decode(self, *args)

    monkeypatch.setattr(type(MODEL), "decode", counting)
    model = build(dataclasses.replace(CONFIG, max_position_embeddings=64))  # new trace
    prompts, lengths = pad(PROMPTS)
    out, counts, *_ = generate(
        model,
        PARAMS,
        prompts,
        lengths,
        jax.random.key(0),
        max_new_tokens=50,
        stop_tokens=(1, 4, 5, 7, 9, 12),
    )
    jax.effects_barrier()
    # The prompt itself gives the first token.
    assert max(counts.tolist()) < 50 and len(steps) == max(counts.tolist()) - 1


def test_one_compile_for_a_shape(monkeypatch):
    prompts, lengths = pad(PROMPTS)
    draws, traced, filter_likely = [], [], selection.filter_likely

    def counted(*args):
        traced.append(len(draws))
        return filter_likely(*args)

    # Called when the program is traced, and not when it runs.
    monkeypatch.setattr(selection, "filter_likely", counted)
    for seed, options in enumerate(
        [
            dict(temperature=0.5, top_k=3),
            dict(temperature=2.0, top_p=0.9),
            dict(top_k=5, top_p=0.5),
        ]
    ):
        out, *_ = generate(
            MODEL,
            PARAMS,
            prompts + seed,
            lengths,
            jax.random.key(seed),
            max_new_tokens=5,
            stop_tokens=(seed,),
            **options,
        )
        draws.append(out)
    assert set(traced) <= {0} and len(draws) == 3


def test_every_mesh_draws_the_same():
    prompts, lengths = pad(PROMPTS)
    options = [dict(temperature=0.0), dict(top_k=5, top_p=0.9)]

    def run(params):
        return [
            generate(
                MODEL,
                params,
                prompts,
                lengths,
                jax.random.key(3),
                max_new_tokens=5,
                stop_tokens=(2,),
                **option,
            )
            for option in options
        ]

    expected = run(jax.jit(MODEL.init)(jax.random.key(0)))
    for sizes in [(1, 1, 1), (2, 2, 2)]:
        devices = jax.devices()[: int(np.prod(sizes))]
        names, types = ("data", "fsdp", "tensor"), (AxisType.Explicit,) * 3
        mesh = jax.make_mesh(sizes, names, axis_types=types, devices=devices)
        with jax.set_mesh(mesh):
            found = run(jax.jit(MODEL.init)(jax.random.key(0)))
            for one, other in zip(found, expected, strict=True):
                for name in ("tokens", "counts", "ended"):
                    a, b = getattr(one, name), getattr(other, name)
                    np.testing.assert_array_equal(a, b)
                # Five sums of float32 log-probabilities, rounded in another order.
                np.testing.assert_allclose(one.logps, other.logps, rtol=1e-5)
            if sizes[0] > 1:
                with pytest.raises(InputError, match="multiple of the 4 devices"):
                    generate(
                        MODEL,
                        PARAMS,
                        prompts[:3],
                        lengths[:3],
                        jax.random.key(0),
                        max_new_tokens=1,
                    )


def test_bfloat16_compute_samples():
    model = build(CONFIG, Numerics(compute_dtype="bfloat16"))
    prompts, lengths = pad(PROMPTS)
    out, *_ = generate(
        model, PARAMS, prompts, lengths, jax.random.key(0), max_new_tokens=3
    )
    assert out.shape == (4, 3)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_an_option_out_of_range_is_named(options, words):
    prompts, lengths = pad(PROMPTS)
    with pytest.raises(InputError, match=words):
        generate(
            MODEL,
            PARAMS,
            prompts,
            lengths,
            jax.random.key(0),
            **{"max_new_tokens": 1} | options,
        )


def test_a_prompt_that_is_empty_or_too_long_is_named():
    with pytest.raises(InputError, match="row 2: 0 tokens"):
        pad([[1], []])
    with pytest.raises(InputError, match="row 1: 3 tokens; .* between 1 and 2"):
        pad([[1, 2, 3]], 2)
