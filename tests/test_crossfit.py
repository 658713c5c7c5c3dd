"""Cross-fitting: no pair is judged by a model trained on it, and the fit is optimal."""

import numpy as np
import pytest
import scipy.optimize

from jaxpref.evaluate.crossfit import cross_fit, fit_path, prompt_folds, scaled


def draw(count=120, width=6, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, width))
    truth = rng.normal(size=width)
    right = rng.random(count) < 1 / (1 + np.exp(-x @ truth))
    return np.where(right[:, None], x, -x)


def oracle(x, penalty, targets):
    """The same minimum by scipy's quasi-Newton method."""

    def loss(b):
        margins = x @ b
        losses = np.logaddexp(0, margins) - targets * margins
        gradient = x.T @ (1 / (1 + np.exp(-margins)) - targets) / len(x) + penalty * b
        return losses.mean() + penalty / 2 * b @ b, gradient

    found = scipy.optimize.minimize(
        loss, np.zeros(x.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-10}
    )
    return found.x


@pytest.mark.parametrize("count, width", [(120, 6), (12, 40)], ids=["tall", "wide"])
@pytest.mark.parametrize("soft", [False, True])
def test_the_fit_is_the_minimum_for_every_penalty(count, width, soft):
    x = draw(count, width)
    targets = np.random.default_rng(1).random(count) if soft else np.ones(count)
    penalties = (0.03, 0.3, 3.0)
    found = fit_path(x, penalties, targets if soft else None)
    for column, penalty in zip(found.T, penalties):
        np.testing.assert_allclose(column, oracle(x, penalty, targets), atol=1e-5)


def test_exchanging_the_answers_only_changes_the_sign_of_the_margin():
    x, rng = draw(), np.random.default_rng(2)
    signs = rng.choice([-1.0, 1.0], len(x))
    soft = rng.random(len(x))
    flipped = fit_path(x * signs[:, None], [0.1], np.where(signs > 0, soft, 1 - soft))
    np.testing.assert_allclose(flipped, fit_path(x, [0.1], soft), atol=1e-6)


def test_labels_of_a_fold_do_not_affect_its_own_margins():
    x = draw(90)
    folds, inner = np.arange(90) % 3, np.arange(90) // 3 % 4
    before = cross_fit(x, folds, inner).margins
    for fold in range(3):
        changed = np.where((folds == fold)[:, None], -x, x)
        after = cross_fit(changed, folds, inner).margins
        # The answers of the fold are exchanged, so its margins change sign exactly.
        np.testing.assert_array_equal(after[folds == fold], -before[folds == fold])
        assert not np.allclose(after[folds != fold], before[folds != fold])


def test_the_penalty_depends_only_on_the_training_pairs():
    x = draw(90)
    folds, inner = np.arange(90) % 3, np.arange(90) // 3 % 4
    chosen = cross_fit(x, folds, inner).penalties
    rng = np.random.default_rng(3)
    for fold in range(3):
        noise = np.where((folds == fold)[:, None], rng.normal(size=x.shape), x)
        assert cross_fit(noise, folds, inner).penalties[fold] == chosen[fold]


def test_uninformative_columns_get_a_large_penalty():
    x = np.random.default_rng(4).normal(size=(200, 30))
    found = cross_fit(x, np.arange(200) % 2, np.arange(200) // 2 % 5)
    assert (found.penalties >= 1).all()
    nothing = cross_fit(np.zeros((8, 2)), np.arange(8) % 2, np.arange(8) % 4)
    np.testing.assert_array_equal(nothing.margins, 0)


def test_folds_are_by_prompt_and_depend_on_the_seed():
    prompts = [f"prompt {n % 50}" for n in range(200)]
    folds = prompt_folds(prompts, folds=5, seed=0)
    assert set(folds) == set(range(5))
    for n in range(50):
        assert len(set(folds[n::50])) == 1
    assert np.bincount(folds[:50]).tolist() == [10] * 5
    order = np.random.default_rng(5).permutation(200)
    moved = prompt_folds([prompts[n] for n in order], folds=5, seed=0)
    np.testing.assert_array_equal(moved, folds[order])
    other = prompt_folds(prompts, folds=5, seed=1)
    # 50 prompts, each in the same fold with probability 1/5: 10 plus 3 standard errors.
    assert np.sum(folds[:50] == other[:50]) < 20


def test_a_single_fold_gives_zero_margins():
    found = cross_fit(draw(10), np.zeros(10, int), np.zeros(10, int))
    np.testing.assert_array_equal(found.margins, 0)
    assert np.isnan(found.penalties).all()


def test_columns_are_scaled_to_a_mean_square_of_one():
    columns = np.stack([np.arange(5.0), np.zeros(5), -3 * np.ones(5)], axis=1)
    square = (scaled(columns) ** 2).mean(axis=0)
    np.testing.assert_allclose(square, [1, 0, 1], atol=1e-12)
