"""What holds for every family: folders, packed rows, meshes, decoding."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.models import RewardModel, build
from jaxpref.models.families import FAMILIES
from jaxpref.models.folder import check_folder, load_params, save
from jaxpref.sampling import generate, pad
from tests.family_cases import CASES, architecture_of, fields_of, random_params
from tests.test_models import mesh

cases = pytest.mark.parametrize("case", CASES)
FAST = "gemma3 gpt2 gpt_neox mixtral phi3 smollm3".split()
"""Families that differ most; the others are slow."""
by_family = pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in CASES
    ],
)
RNG = np.random.default_rng(1)
PROMPT, ANSWERS = 5, (4, 6)
TEXTS = RNG.integers(3, 64, (8, PROMPT + sum(ANSWERS)))


def test_every_family_has_a_case_of_its_name():
    assert {fields_of(case)["model_type"] for case in CASES if " " not in case} == {
        family.model_type for family in FAMILIES
    }


def test_the_table_of_families_is_that_of_this_checkout():
    path = Path(__file__).parents[1] / "docs" / "make_model_table.py"
    spec = importlib.util.spec_from_file_location("make_model_table", path)
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    again = "run `python docs/make_model_table.py` and commit the page"
    assert maker.page() == maker.PAGE.read_text("utf-8"), again


@cases
def test_a_folder_round_trips(case, tmp_path):
    architecture = architecture_of(case)
    for name, model in [("a", build(architecture)), ("b", RewardModel(architecture))]:
        params = random_params(model)
        save(tmp_path / name, model, params)
        assert check_folder(tmp_path / name) == architecture
        jax.tree.map(
            np.testing.assert_array_equal, load_params(tmp_path / name, model), params
        )


def packed_rows():
    """Each row of TEXTS as a prompt with two answers: tokens, positions, segments."""
    first = np.arange(PROMPT + ANSWERS[0])
    second = np.arange(PROMPT, PROMPT + ANSWERS[1])
    positions = np.concatenate([first, second])
    parts = np.repeat([0, 1, 2], [PROMPT, *ANSWERS])
    rows = len(TEXTS)
    spread = lambda x: jnp.asarray(np.broadcast_to(x, (rows, len(x))))
    ids = jnp.zeros((rows, len(parts)), jnp.int32)
    return spread(positions), (ids, spread(parts), 2)


def hidden_of_answers(model, params):
    """States of the prompt and both answers, each text in a row of its own."""
    one = model.hidden(params, TEXTS[:, : PROMPT + ANSWERS[0]])
    other = np.concatenate([TEXTS[:, :PROMPT], TEXTS[:, -ANSWERS[1] :]], axis=1)
    two = model.hidden(params, other)[:, PROMPT:]
    return jnp.concatenate([one, two], axis=1)


def loss_and_gradient(hidden, model):
    def loss(params):
        x = hidden(model, params)
        weights = jnp.cos(jnp.arange(x.size).reshape(x.shape))
        return jnp.mean(x.astype(jnp.float32) * weights), x

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@by_family
def test_packed_rows_on_a_mesh_are_texts_on_one_device(case):
    model = build(architecture_of(case))
    (_, expected), gradient = loss_and_gradient(hidden_of_answers, model)(
        random_params(model)
    )
    positions, segments = packed_rows()
    packed = lambda model, params: model.hidden(params, TEXTS, positions, segments)
    sizes = (2, 4, 1) if model.architecture.num_kv_heads % 2 else (2, 2, 2)
    if case in ("mixtral", "qwen3_moe", "olmoe"):
        sizes = (1, 2, 2, 2)  # data, fsdp, expert, tensor
    with mesh(*sizes):
        params = random_params(model)
        (_, found), found_gradient = loss_and_gradient(packed, model)(params)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * largest)
    jax.tree.map(close, found_gradient, gradient)


@by_family
def test_greedy_decoding_is_the_argmax_of_whole_texts(case):
    model = build(architecture_of(case))
    params = random_params(model)
    prompts, lengths = pad([TEXTS[0, :3].tolist(), TEXTS[1, :7].tolist()])
    new, *_ = generate(
        model,
        params,
        prompts,
        lengths,
        jax.random.key(0),
        max_new_tokens=8,
        temperature=0,
    )
    texts = np.zeros((2, 15), int)
    for row, n in enumerate((3, 7)):
        texts[row, : n + 8] = [*TEXTS[row, :n], *new[row].tolist()]
    logits = jax.jit(model.logits)(params, texts)
    for row, n in enumerate((3, 7)):
        chosen = np.argmax(logits[row, n - 1 : n + 7], axis=-1)
        np.testing.assert_array_equal(new[row], chosen)


@pytest.mark.parametrize("case", ["gemma2", "gemma3", "mistral"])
def test_windows_and_caps_change_the_function(case):
    architecture = architecture_of(case)
    params = random_params(build(architecture))
    logits = lambda a: build(a).logits(params, TEXTS[:1])
    changes = [{"sliding_window": None}]
    if architecture.attention_soft_cap:
        changes += [{"attention_soft_cap": None}, {"logit_soft_cap": None}]
    for change in changes:
        other = logits(dataclasses.replace(architecture, **change))
        assert jnp.abs(other - logits(architecture)).max() > 1e-3, change
