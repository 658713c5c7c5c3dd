"""The transformer: against plain numpy, and the same in every layout and policy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxpref.errors import InputError
from jaxpref.models import Numerics, build
from jaxpref.models.cache import insert, resized
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.models.rotary import LinearScaling, Llama3Scaling, inverse_frequencies
from jaxpref.models.stacks import unstacked
from jaxpref.runtime.mesh import AXES, EXPERT_AXES

CONFIG = LlamaArchitecture(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    initializer_range=0.3,
)
LLAMA3 = Llama3Scaling(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
B, T = 8, 7
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (B, T))


def replace(**changes):
    """The model with changes to its architecture and numerics."""
    names = {field.name for field in dataclasses.fields(Numerics)} & set(changes)
    numerics = Numerics(**{name: changes.pop(name) for name in names})
    return build(dataclasses.replace(CONFIG, **changes), numerics)


def mesh(*sizes):
    """The sizes of data, fsdp, and tensor, or of data, fsdp, expert, and tensor."""
    names = AXES if len(sizes) == 3 else EXPERT_AXES
    types = (AxisType.Explicit,) * len(sizes)
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.set_mesh(jax.make_mesh(sizes, names, axis_types=types, devices=devices))


def frequencies(config):
    return inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)


def numpy_frequencies(config):
    """By the wavelength, a feature pair at a time; nothing of ours but the config."""
    s, out = config.rope_scaling, []
    for i in range(config.head_dim // 2):
        f = 1 / config.rope_theta ** (2 * i / config.head_dim)
        if s is not None and isinstance(s, LinearScaling):
            f = f / s.factor
        elif s is not None:
            context, wavelength = s.original_max_position_embeddings, 2 * np.pi / f
            if wavelength > context / s.low_freq_factor:
                f = f / s.factor
            elif wavelength >= context / s.high_freq_factor:
                low, high = s.low_freq_factor, s.high_freq_factor
                smooth = (context / wavelength - low) / (high - low)
                f = (1 - smooth) * f / s.factor + smooth * f
        out.append(f)
    return out


def numpy_logits(config, params, tokens):
    """Logits [T, V] of one sequence in float64, one position and one head at a time."""
    c, group = config, config.num_heads // config.num_kv_heads
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def norm(x, gain):
        return x / np.sqrt((x**2).mean() + c.rms_norm_eps) * gain

    def turn(x, position):
        out = np.zeros_like(x)
        for i, f in enumerate(numpy_frequencies(c)):
            j, angle = i + c.head_dim // 2, position * f
            out[i] = x[i] * np.cos(angle) - x[j] * np.sin(angle)
            out[j] = x[j] * np.cos(angle) + x[i] * np.sin(angle)
        return out

    stream = [p["embed"][token] for token in tokens]
    for i in range(c.num_layers):
        w = {name: a[i] for name, a in p["layers"].items()}
        normed = [norm(x, w["attention_norm"]) for x in stream]
        for t in range(len(stream)):
            added = np.zeros(c.hidden_size)
            for h in range(c.num_heads):
                g = h // group
                q = turn(normed[t] @ w["query"][:, h], t)
                scores = [
                    q @ turn(normed[s] @ w["key"][:, g], s) / np.sqrt(c.head_dim)
                    for s in range(t + 1)
                ]
                weights = np.exp(scores) / np.exp(scores).sum()
                values = [normed[s] @ w["value"][:, g] for s in range(t + 1)]
                added += (weights @ np.array(values)) @ w["output"][h]
            stream[t] = stream[t] + added
        for t, x in enumerate(stream):
            h = norm(x, w["mlp_norm"])
            gate = h @ w["gate"]
            stream[t] = x + (gate / (1 + np.exp(-gate)) * (h @ w["up"])) @ w["down"]
    head = p["embed"].T if c.tie_word_embeddings else p["head"]
    return np.array([norm(x, p["norm"]) @ head for x in stream])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", [None, LinearScaling(factor=4.0), LLAMA3])
def test_logits_are_those_of_plain_numpy(tied, scaling):
    model = replace(tie_word_embeddings=tied, rope_scaling=scaling)
    params = model.init(jax.random.key(0))
    assert ("head" in params) != tied
    rng = np.random.default_rng(1)  # gains other than one
    params = jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape), params)
    params = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    logits = jax.jit(model.logits)(params, TOKENS[:1])[0]
    assert logits.dtype == jnp.float32
    expected = numpy_logits(model.architecture, params, TOKENS[0])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(
        model.head(params), params["embed"].T if tied else params["head"]
    )


@pytest.mark.parametrize(
    "theta, scaling, expected",
    [
        (1e4, LinearScaling(factor=4.0), [0.25, 0.025, 0.0025, 0.00025]),
        (
            5e5,
            Llama3Scaling(
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
            [1.0, 0.03760603070259094, 0.0005248460220173001, 6.647869668086059e-06],
        ),
    ],
    ids=["linear", "llama3"],
)
def test_frequencies_are_those_of_transformers(theta, scaling, expected):
    """What transformers 5's ROPE_INIT_FUNCTIONS give, in float32."""
    config = dataclasses.replace(
        CONFIG, head_dim=8, rope_theta=theta, rope_scaling=scaling
    )
    np.testing.assert_allclose(frequencies(config), expected, rtol=3e-7)


def test_llama3_scaling_keeps_short_and_stretches_long_wavelengths():
    config = dataclasses.replace(CONFIG, head_dim=64, rope_theta=500000.0)
    plain = np.array(frequencies(config))
    llama3 = dataclasses.replace(LLAMA3, original_max_position_embeddings=8192)
    scaled = np.array(frequencies(dataclasses.replace(config, rope_scaling=llama3)))
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192 / 1
    assert short.any() and long.any() and (~short & ~long).any()
    np.testing.assert_allclose(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8)
    between = scaled[~short & ~long] / plain[~short & ~long]
    assert np.all((between > 1 / 8) & (between < 1)) and np.all(np.diff(between) < 0)


def test_later_tokens_and_padding_on_the_right_change_nothing():
    model = build(CONFIG)
    params = model.init(jax.random.key(0))
    changed = TOKENS.copy()
    changed[:, 5:] = 0
    a, b = (np.asarray(model.hidden(params, t)) for t in (TOKENS, changed))
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert np.abs(a[:, 5:] - b[:, 5:]).max() > 0.1


def test_segments_and_positions_pack_two_sequences_into_one_row():
    model = build(CONFIG)
    params = model.init(jax.random.key(0))
    row = np.concatenate([TOKENS[0, :4], TOKENS[1, :3]])[None]
    pairs, positions = [[0] * 4 + [1] * 3], [[0, 1, 2, 3, 0, 1, 2]]
    segments = jnp.array(pairs), jnp.zeros((1, 7), int)
    packed = model.hidden(params, row, jnp.array(positions), segments)
    np.testing.assert_allclose(
        packed[0, :4], model.hidden(params, TOKENS[:1, :4])[0], atol=2e-6
    )
    np.testing.assert_allclose(
        packed[0, 4:], model.hidden(params, TOKENS[1:2, :3])[0], atol=2e-6
    )


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_cache_gives_what_whole_texts_give(by_layer):
    """Full and sliding attention; rings of 3 slots wrap around several times."""
    model = replace(num_layers=4, sliding_window=3)
    layers = (True, True, False, True)
    architecture = dataclasses.replace(model.architecture, sliding_layers=layers)
    model = dataclasses.replace(model, architecture=architecture)
    params = model.init(jax.random.key(0))
    texts = np.random.default_rng(0).integers(0, 32, (4, 18))
    lengths, steps = np.array([8, 1, 3, 2]), 10
    expected = jax.jit(model.hidden)(params, texts)
    read = unstacked(params) if by_layer else params
    hidden, cache = jax.jit(model.prefill)(read, texts[:, :8], lengths)
    cache = resized(cache, 16)
    slots = {stack.window: stack.keys.shape[3] for stack in cache.stacks}
    assert slots == {None: 16, 3: 3} and len(cache.stacks) == (4 if by_layer else 3)
    rows, decode = np.arange(4), jax.jit(model.decode)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-6)
    close(hidden[:, 0], expected[rows, lengths - 1])
    for step in range(steps):
        active = rows != step % 5  # a row that waits stays as it is
        hidden, cache = decode(read, texts[rows, lengths], cache, active)
        close(hidden[active, 0], expected[rows, lengths][active])
        lengths = lengths + active
        np.testing.assert_array_equal(cache.lengths, lengths)


def test_rows_of_a_cache_are_replaced_and_others_stay():
    model = replace(sliding_window=3)
    params = model.init(jax.random.key(0))
    lengths, decode = np.array([6, 2, 5]), jax.jit(model.decode)
    _, old = model.prefill(params, TOKENS[:3, :6], lengths)
    _, new = model.prefill(params, TOKENS[3:5, :4], np.array([4, 1]))
    # The second prompt is nowhere: there are only rows 0, 1 and 2.
    cache = insert(resized(old, 8), new, jnp.array([1, 3]))
    texts = [TOKENS[0, :7], TOKENS[3, :5], TOKENS[2, :6]]
    following = np.array([text[-1] for text in texts])
    hidden, cache = decode(params, following, cache, np.ones(3, bool))
    assert cache.lengths.tolist() == [7, 5, 6]
    for row, text in enumerate(texts):
        expected = model.hidden(params, text[None])[0, -1]
        np.testing.assert_allclose(hidden[row, 0], expected, rtol=0, atol=2e-6)


def loss(model):
    def f(params, tokens):
        hidden = model.hidden(params, tokens).astype(jnp.float32)
        return jnp.mean(hidden * jnp.cos(jnp.arange(hidden.shape[-1])))

    return jax.jit(jax.value_and_grad(f))


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (8, 1, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2)]
)
def test_every_mesh_gives_the_same(sizes):
    model = build(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0))
    expected = loss(model)(params, TOKENS)
    logits = model.logits(params, TOKENS)
    with mesh(*sizes):
        sharded = jax.jit(model.init)(jax.random.key(0))
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        assert jax.tree.map(jax.typeof, sharded) == jax.tree.map(jax.typeof, shapes)
        assert jax.typeof(sharded["layers"]["query"]).sharding.spec == P(
            None, "fsdp", "tensor", None
        )
        # The same random bits, made normal by another program: sqrt(2) erfinv(u), where
        # 1 - u^2 is known to 2^-25.  At 4 standard deviations, the largest of a few
        # thousand draws, that is 2e-4 of it, and 2e-5 of the normal number.
        drawn = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=0)
        jax.tree.map(drawn, sharded, params)
        found = loss(model)(sharded, TOKENS)
        assert jax.tree.map(jax.typeof, found[1]) == jax.tree.map(jax.typeof, sharded)
        found_logits = jax.jit(model.logits)(sharded, TOKENS)
        assert jax.typeof(found_logits).sharding.spec == P(
            ("data", "fsdp"), None, "tensor"
        )
    np.testing.assert_allclose(found_logits, logits, rtol=0, atol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    jax.tree.map(close, found, expected)


def test_remat_changes_memory_and_not_the_gradient():
    expected, kept = None, {}
    for remat in ("none", "dots", "full"):
        model = replace(remat=remat, num_layers=4)
        params = model.init(jax.random.key(0))
        found = loss(model)(params, TOKENS)
        expected = expected or found
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
        jax.tree.map(close, found, expected)
        hidden = functools.partial(model.hidden, tokens=TOKENS)
        _, backward = jax.vjp(hidden, params)
        kept[remat] = sum(a.nbytes for a in jax.tree.leaves(backward))
    assert kept["none"] > kept["dots"] > kept["full"]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_that_are_written_out_change_nothing_but_rounding(remat):
    params = replace(num_layers=3).init(jax.random.key(0))
    expected = loss(replace(num_layers=3, remat=remat))(params, TOKENS)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    for unroll in (2, 3, 99):  # some, all, and more than there are
        model = replace(num_layers=3, remat=remat, unroll=unroll)
        jax.tree.map(close, loss(model)(params, TOKENS), expected)


def test_bfloat16_compute_keeps_float32_parameters_and_gradients():
    model = replace(compute_dtype="bfloat16")
    params = model.init(jax.random.key(0))
    assert model.hidden(params, TOKENS).dtype == jnp.bfloat16
    assert model.logits(params, TOKENS).dtype == jnp.float32
    _, gradients = loss(model)(params, TOKENS)
    assert {a.dtype for a in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    exact = build(CONFIG).logits(params, TOKENS)
    error = jnp.abs(model.logits(params, TOKENS) - exact).max() / jnp.abs(exact).max()
    assert error < 0.03  # 2^-8 a rounding, some ten roundings deep
    half = replace(param_dtype="bfloat16").init(jax.random.key(0))
    assert {a.dtype for a in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}


def test_float64_compute_is_float64_throughout():
    with jax.enable_x64(True):
        model = replace(param_dtype="float64", compute_dtype="float64")
        params = model.init(jax.random.key(0))
        logits = jax.jit(model.logits)(params, TOKENS)
        expected = numpy_logits(model.architecture, params, TOKENS[0])
        np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-12)
        one_pair = (jnp.zeros((B, T), int),) * 2
        packed = jax.jit(lambda p: model.hidden(p, TOKENS, None, one_pair))(params)
        whole = jax.jit(lambda p: model.hidden(p, TOKENS))(params)
        np.testing.assert_allclose(packed, whole, rtol=0, atol=1e-12)
        with mesh(2, 2, 2):
            sharded = jax.jit(model.init)(jax.random.key(0))
            found = jax.jit(model.logits)(sharded, TOKENS)
        np.testing.assert_allclose(found, logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "sizes, changes, words",
    [
        ((1, 1, 4), {}, "tensor=4 does not divide the model's num_kv_heads=2"),
        ((1, 1, 2), {"vocab_size": 33}, "tensor=2 does not divide .* vocab_size=33"),
        ((1, 4, 1), {"vocab_size": 34}, "fsdp=4 does not divide .* vocab_size=34"),
        ((1, 1, 2), {"intermediate_size": 25}, "intermediate_size=25"),
        ((1, 8, 1), {"hidden_size": 12}, "fsdp=8 does not divide .* hidden_size=12"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_named(sizes, changes, words):
    with mesh(*sizes), pytest.raises(InputError, match=words):
        jax.eval_shape(replace(**changes).init, jax.random.key(0))


@pytest.mark.parametrize("automatic", [0, 2])
def test_a_mesh_that_is_not_explicit_is_named(automatic):
    types = [AxisType.Explicit] * 3
    types[automatic] = AxisType.Auto
    names = ("data", "fsdp", "tensor")
    made = jax.make_mesh((2, 2, 2), names, axis_types=tuple(types))
    words = "Auto.*axis_types=.jax.sharding.AxisType.Explicit"
    with jax.set_mesh(made), pytest.raises(InputError, match=words):
        build(CONFIG).init(jax.random.key(0))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"head_dim": 5}, "head_dim=5 .* has 5 rotated features; .* must be even"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"unroll": 0}, "unroll is 0; it must be >= 1"),
        ({"remat": "all"}, "remat is 'all'; use none, dots or full"),
        ({"compute_dtype": "fp8"}, "compute_dtype is 'fp8'"),
    ],
)
def test_a_config_that_makes_no_model_is_an_input_error(changes, words):
    with pytest.raises(InputError, match=words):
        replace(**changes)
