"""PAL: margins, planted groups of annotators, and new annotators."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.noise import prototypes

ANGLES = 2 * np.pi / 3 * np.arange(3)
POINTS = np.stack([6 * np.cos(ANGLES), 6 * np.sin(ANGLES), np.ones(3), 0 * ANGLES], 1)
"""Three groups that disagree in a plane, and agree in a third feature."""


def votes(groups, count, seed):
    """`count` votes of each annotator for the answer nearer to its group's point."""
    rng = np.random.default_rng(seed)
    annotators = np.repeat(np.arange(len(groups)), count)
    first, second = rng.normal(size=(2, len(annotators), 4))
    ideal = POINTS[np.asarray(groups)[annotators]]
    distances = [np.sum((x - ideal) ** 2, axis=1) for x in (first, second)]
    probability = 1 / (1 + np.exp(distances[0] - distances[1]))
    swap = (rng.random(len(annotators)) > probability)[:, None]
    return np.where(swap, second, first), np.where(swap, first, second), annotators


def adjusted_rand(ours, theirs):
    """Hubert and Arabie 1985, by counting pairs of items."""
    pairs = list(itertools.combinations(range(len(ours)), 2))
    same = np.array([[x[i] == x[j] for i, j in pairs] for x in (ours, theirs)])
    both, a, b = (same.all(0).sum(), *same.sum(1))
    chance = a * b / len(pairs)
    return (both - chance) / ((a + b) / 2 - chance)


def test_margins_of_mixtures_are_those_of_ideal_points():
    rng = np.random.default_rng(0)
    first, second, _ = votes([0, 1], 5, 0)
    weights = rng.dirichlet(np.ones(3), size=2)
    annotators = np.arange(10) % 2
    margins = prototypes.ideal_point_margins(first, second, POINTS)
    found = prototypes.mixed_margins(margins, weights, annotators)
    for n in range(10):
        ideal = weights[annotators[n]] @ POINTS
        expected = ((second[n] - ideal) ** 2).sum() - ((first[n] - ideal) ** 2).sum()
        np.testing.assert_allclose(found[n], expected, rtol=1e-4, atol=1e-5)
    directions = rng.normal(size=(10, 3, 4))
    by_direction = prototypes.direction_margins(first, second, directions)
    expected = [[g @ (first[n] - second[n]) for g in directions[n]] for n in range(10)]
    np.testing.assert_allclose(by_direction, expected, rtol=1e-4, atol=1e-5)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(n, marks=SLOW) for n in (2, 3, 4, 5, 6))]
)
def test_planted_groups_are_found_from_five_votes_each(seed):
    """Also those of new annotators, whose votes do not change the prototypes."""
    groups = np.arange(120) % 3
    preferred, other, annotators = votes(groups, 5, seed)
    fit = prototypes.fit(
        preferred,
        other,
        annotators,
        jax.random.key(0),
        num_annotators=120,
        num_prototypes=3,
    )
    assert adjusted_rand(np.argmax(fit.weights, 1), groups) >= 0.9
    np.testing.assert_allclose(fit.weights.sum(1), 1, rtol=1e-5)
    loss = np.log1p(np.exp(-np.asarray(fit.margins, float))).mean()
    np.testing.assert_allclose(fit.loss, loss, rtol=1e-4)
    mine = [np.asarray(fit.weights)[groups == g].mean(0).argmax() for g in range(3)]
    preferred, other, annotators = votes(groups, 5, seed + 100)
    margins = prototypes.ideal_point_margins(preferred, other, fit.prototypes)
    new = prototypes.weights_of(margins, annotators, num_annotators=120)
    assert np.mean(np.argmax(new, 1) == np.array(mine)[groups]) > 0.9


def test_weights_are_the_best_on_the_simplex_and_independent():
    rng = np.random.default_rng(3)
    margins, annotators = rng.normal(size=(30, 2)) * 2, np.arange(30) % 3
    found = prototypes.weights_of(margins, annotators, num_annotators=4, steps=2000)
    grid = np.linspace(1e-4, 1 - 1e-4, 9999)
    for a in range(3):
        own = margins[annotators == a]
        mixed = own[:, :1] * grid + own[:, 1:] * (1 - grid)
        total = -np.log1p(np.exp(-mixed)).sum(0) + 0.1 * np.log(grid * (1 - grid))
        np.testing.assert_allclose(found[a, 0], grid[total.argmax()], atol=2e-3)
    np.testing.assert_allclose(found[3], 0.5, atol=1e-6)  # no votes
    # Votes of others, and padding, change nothing.
    real = annotators != 1
    alone = prototypes.weights_of(
        jnp.where(real[:, None], margins, jnp.nan),
        annotators,
        num_annotators=4,
        where=real,
        steps=2000,
    )
    np.testing.assert_allclose(alone[jnp.array([0, 2])], found[jnp.array([0, 2])])
    np.testing.assert_allclose(alone[1], 0.5, atol=1e-6)
