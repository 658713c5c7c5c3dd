"""Stacked judges: their weights are optimal, and nothing sees its own label."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special

from jaxpref.evaluate import stack as stacking
from jaxpref.evaluate.crossfit import PENALTIES, cross_fit, fit_path, prompt_folds
from jaxpref.evaluate.features import Features
from jaxpref.evaluate.flips import auroc
from jaxpref.evaluate.judges import STRONG, judges
from jaxpref.evaluate.stack import chosen, non_negative, stack
from jaxpref.evaluate.words import principal, word_differences
from tests.test_crossfit import draw


def folds_of(count):
    keys = list(map(str, range(count)))
    return [prompt_folds(keys, folds=5, seed=seed) for seed in (0, 1)]


@pytest.mark.parametrize("ridge", stacking.RIDGES)
def test_the_weights_are_the_minimum(ridge):
    rng = np.random.default_rng(0)
    m = rng.normal(size=(300, 4)) + np.array([0.8, 0.4, 0.0, -0.3])
    m[:, 1] += m[:, 0]
    shared = lambda c: np.logaddexp(0, -m.sum(axis=1) * c).mean() + 5e-4 * c**2
    common = scipy.optimize.minimize_scalar(shared).x

    def loss(w):
        return np.logaddexp(0, -m @ w).mean() + ridge / 2 * np.sum((w - common) ** 2)

    exact = {"ftol": 1e-14, "gtol": 1e-10}
    best = scipy.optimize.minimize(
        loss, np.ones(4), bounds=[(0, None)] * 4, method="L-BFGS-B", options=exact
    )
    found = non_negative(m, ridge=ridge)
    np.testing.assert_allclose(found, best.x, atol=2e-3)
    assert (found >= 0).all()
    if ridge < 0.01:
        assert found[3] == 0


def test_equal_weights_unless_the_labels_are_clear():
    rng = np.random.default_rng(0)
    folds = np.arange(400) % 5
    alike = 0.2 + rng.normal(size=(400, 3))
    found = chosen(alike, folds)
    np.testing.assert_array_equal(found, non_negative(alike, ridge=stacking.RIDGES[0]))
    clear = alike + [2.0, 0.0, 0.0]
    found = chosen(clear, folds)
    np.testing.assert_array_equal(found, non_negative(clear, ridge=stacking.RIDGES[-1]))


def test_margins_of_all_folds_have_the_same_size():
    """Nothing is to be learned, and some folds would get no margins by chance."""
    rng = np.random.default_rng(0)
    groups = {name: rng.normal(size=(200, 20)) for name in "ab"}
    folds, inner = folds_of(200)
    found = stack(groups, folds, inner)
    sizes = [np.sqrt(np.mean(found.margins[folds == n] ** 2)) for n in range(5)]
    assert min(sizes) > 0 and max(sizes) < 2 * min(sizes)


def test_labels_of_a_fold_do_not_affect_its_own_margins():
    groups = {"a": draw(90), "b": draw(90, 3, seed=1)}
    folds, inner = folds_of(90)
    before = stack(groups, folds, inner)
    signs = np.where(folds == 2, -1.0, 1.0)
    after = stack({k: x * signs[:, None] for k, x in groups.items()}, folds, inner)
    mine = folds == 2
    # Apart from the size that all margins share.
    ratio = -after.margins[mine] / before.margins[mine]
    np.testing.assert_allclose(ratio, ratio[0])
    assert not np.allclose(after.margins[~mine], before.margins[~mine])


def test_the_stack_keeps_to_the_judge_that_knows():
    """An informative column beside sixty that say nothing, and the other way round."""
    rng = np.random.default_rng(1)
    count = 600
    flips = rng.random(count) < 0.2
    known = (1.5 * (1 - 2 * flips) + rng.normal(size=count))[:, None]
    noise = rng.normal(size=(count, 60))
    folds, inner = folds_of(count)
    found = stack({"known": known, "noise": noise}, folds, inner)
    alone = auroc(-found.alone["known"], flips)
    assert auroc(-found.margins, flips) > alone - 0.01
    assert found.weights["known"] > 5 * found.weights["noise"]
    # The margins are calibrated: their best temperature is near 1.
    best = scipy.optimize.minimize_scalar(
        lambda x: np.logaddexp(0, -found.margins * x).mean(), bounds=(0.1, 5)
    )
    assert best.x == pytest.approx(1, abs=0.2)


def test_inner_margins_are_those_of_the_selected_penalty():
    x = draw(80)
    folds, inner = np.arange(80) % 4, np.arange(80) // 4 % 3
    found = cross_fit(x, folds, inner)
    train = folds != 1
    for held in range(3):
        test = train & (inner == held)
        fit = fit_path(x[train & ~test], [found.penalties[1]])[:, 0]
        np.testing.assert_allclose(found.inner[1][test], x[test] @ fit, atol=2e-3)
    assert (found.inner[1][~train] == 0).all() and found.penalties[1] in PENALTIES


def test_only_learned_pairs_are_learned_from():
    x = draw(90)
    learned = np.arange(90) < 60
    folds = np.where(learned, np.arange(90) % 3, 3)
    found = cross_fit(x, folds, np.arange(90) // 3 % 4, learned=learned)
    best = fit_path(x[learned], [found.penalties[3]])[:, 0]
    np.testing.assert_allclose(found.margins[60:], x[60:] @ best, atol=2e-3)
    changed = np.where(learned[:, None], x, -x)
    again = cross_fit(changed, folds, np.arange(90) // 3 % 4, learned=learned)
    np.testing.assert_allclose(again.margins[:60], found.margins[:60], atol=1e-12)


ANSWERS = [
    ("the cat sat on the mat", "a cat ran"),
    ("a dog ran the mat", "the dog sat sat"),
    ("the mat", "a cat and a dog"),
]


def test_words_are_weighted_like_scikit_learns():
    """The formula of `TfidfVectorizer(sublinear_tf=True)`, for words in 3 answers."""
    texts = [x for pair in ANSWERS for x in pair]
    words = sorted({w for x in texts for w in x.split()})
    counts = np.array([[x.split().count(w) for w in words] for x in texts])
    within = (counts > 0).sum(axis=0)
    kept = within >= 3
    table = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0)
    table = table * (np.log((1 + 6) / (1 + within)) + 1)
    table = table[:, kept] / np.linalg.norm(table[:, kept], axis=1, keepdims=True)
    found = word_differences(ANSWERS)
    order = np.lexsort((np.array(words)[kept], -within[kept]))
    np.testing.assert_allclose(found, (table[::2] - table[1::2])[:, order], atol=1e-6)


def test_principal_directions_do_not_depend_on_labels():
    rng = np.random.default_rng(2)
    x = (rng.normal(size=(60, 5)) * [9, 7, 5, 3, 2]) @ rng.normal(size=(5, 40))
    x += 1e-3 * rng.normal(size=x.shape)
    signs = rng.choice([-1.0, 1.0], (60, 1))
    found = principal(x, directions=5)
    np.testing.assert_allclose(principal(signs * x, directions=5), signs * found)
    # A matrix of rank 5 keeps its inner products.
    np.testing.assert_allclose(found @ found.T, x @ x.T, atol=0.05)
    assert principal(x[:, :3]).shape == (60, 3)


def test_the_length_is_that_of_the_whole_text():
    """Also where the language model reads equally many tokens of both answers."""
    answers = [("a" * 5000, "a" * 2000), ("b", "b b b b")]
    read = np.full((2, 2), 64, np.int32)
    found = Features(np.zeros((2, 2, 4)), np.ones((2, 2)), read)
    columns = judges(found, np.zeros((2, 1)), answers)
    expected = np.log([5001 / 2001, 2 / 8])
    expected /= np.sqrt(np.mean(expected**2))
    np.testing.assert_allclose(columns["length"][:, 0], expected)
    for name in ("surface", "words", "states"):
        np.testing.assert_allclose(columns[name][:, -1], STRONG * expected)
