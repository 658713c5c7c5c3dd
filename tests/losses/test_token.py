"""Properties of token-level losses, beyond test_battery.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from jaxpref import losses
from tests.losses.arrays import arrays_of
from tests.losses.rows_token import ROWS
from tests.losses.test_battery import on_device

TDPO1, TDPO2 = (
    next(row for row in ROWS if row.loss is loss)
    for loss in (losses.tdpo1, losses.tdpo2)
)


@pytest.mark.parametrize("row", [TDPO1, TDPO2], ids=lambda row: row.name)
def test_no_divergence_is_dpo(row):
    arrays = on_device(arrays_of(row), jnp.float32)[:4]
    zero = jnp.zeros_like(arrays[0])
    np.testing.assert_array_equal(
        row.loss(*arrays, zero, zero, beta=0.3), losses.dpo(*arrays, beta=0.3)
    )


def test_tdpo2_at_alpha_1_is_tdpo1_with_a_stop_gradient():
    """The values agree; only the gradient in the chosen divergence differs."""
    arrays = on_device(arrays_of(TDPO1), jnp.float32)
    second = functools.partial(losses.tdpo2, alpha=1.0)
    np.testing.assert_allclose(second(*arrays), losses.tdpo1(*arrays), rtol=1e-6)
    derivatives = lambda loss: jax.grad(
        lambda *a: jnp.sum(loss(*a)), argnums=tuple(range(6))
    )(*arrays)
    for i, (first, other) in enumerate(
        zip(derivatives(losses.tdpo1), derivatives(second))
    ):
        if i == 4:
            # TDPO1 decreases if the policy leaves the reference on chosen answers.
            assert (first < 0).any() and not (first > 0).any() and not other.any()
        else:
            np.testing.assert_allclose(first, other, rtol=1e-5, atol=1e-30)


@pytest.fixture(scope="module")
def tables():
    """Full distributions for a row of two completions, and the sampled tokens."""
    rng = np.random.default_rng(0)
    policy, reference = log_softmax(rng.normal(size=(2, 6, 2, 7, 11)) * 2, axis=-1)
    said = rng.integers(0, 11, size=(6, 2, 7, 1))
    of_tokens = [
        np.take_along_axis(t, said, axis=-1)[..., 0] for t in (policy, reference)
    ]
    owner = np.broadcast_to(np.arange(2)[:, None], (6, 2, 7)).copy()
    owner[:, 0, 5:] = owner[:, 1, 6:] = -1
    return [jnp.asarray(x) for x in (policy, reference, *of_tokens, owner)]


def masked_arrays(tables, mask_u, mask_d):
    policy, reference, policy_tokens, reference_tokens, owner = tables
    total = functools.partial(
        losses.sum_weighted_by_completion, completions=owner, num_completions=2
    )
    ratios = total(policy_tokens - reference_tokens, mask_u)
    kls = total(losses.token_kls(policy, reference), mask_d)
    return ratios[:, 0], ratios[:, 1], kls[:, 0], kls[:, 1]


def test_sparse_po_between_dpo_and_tdpo1(tables):
    """P14: masks of 1 give TDPO1; without divergences it is DPO."""
    policy, reference, policy_tokens, reference_tokens, owner = tables
    total = functools.partial(
        losses.sum_by_completion, completions=owner, num_completions=2
    )
    sides = lambda x: (x[:, 0], x[:, 1])
    four = *sides(total(policy_tokens)), *sides(total(reference_tokens))
    kls = sides(total(losses.token_kls(policy, reference)))
    ones, zeros = jnp.ones_like(policy_tokens), jnp.zeros_like(policy_tokens)
    np.testing.assert_allclose(
        losses.sparse_po(*masked_arrays(tables, ones, ones), beta=0.5),
        losses.tdpo1(*four, *kls, beta=0.5),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        losses.sparse_po(*masked_arrays(tables, ones, zeros), beta=0.5),
        losses.dpo(*four, beta=0.5),
        rtol=1e-5,
    )


def test_sparse_po_learns_its_masks(tables):
    """Every real token's masks have a gradient; padding has none."""
    loss = lambda u, d: losses.sparse_po(*masked_arrays(tables, u, d)).sum()
    ones = jnp.ones_like(tables[2])
    real = np.asarray(tables[-1]) >= 0
    for gradient in jax.grad(loss, argnums=(0, 1))(ones, ones):
        assert gradient[real].all() and not gradient[~real].any()


@pytest.mark.parametrize("alpha", [-0.1, float("inf")])
def test_tdpo2_rejects_invalid_alpha(alpha):
    arrays = on_device(arrays_of(TDPO2), jnp.float32)
    with pytest.raises(ValueError, match=f"alpha >= 0 and finite, got {alpha}"):
        losses.tdpo2(*arrays, alpha=alpha)


def test_activation_masks_are_rescaled_within_each_completion():
    rng = np.random.default_rng(0)
    activations = rng.normal(0, 3, (4, 2, 12))
    # Completions of several sequences, of one token, of equal activations, and none.
    owners = np.repeat([[0, 1, 1, 3, -1, 4], [0, 2, 4, 4, 4, -1]], 2, axis=1)
    owners = np.stack([owners] * 4)
    owners[:, 1, 3] = -1
    activations[owners == 1] = 0.7
    activations[owners == -1] = np.nan
    expected = np.zeros_like(activations)
    for row in range(4):
        for c in range(5):
            at = owners[row] == c
            a = activations[row][at]
            z = a - a.mean() if len(set(a)) == 1 else (a - a.mean()) / a.std()
            spread = z.max() - z.min()
            expected[row][at] = (z - z.min()) / spread if spread else 1
    masks = functools.partial(losses.activation_masks, num_completions=6)
    with jax.enable_x64(True):
        found = masks(jnp.asarray(activations), jnp.asarray(owners))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    single = masks(jnp.asarray(activations, jnp.float32), jnp.asarray(owners))
    np.testing.assert_allclose(single, expected, atol=1e-5)
