"""SPA's refinement: which labels are smoothed, and what is remembered."""

import functools

import numpy as np
import pytest
from scipy.special import expit

from jaxpref import losses
from jaxpref.errors import InputError
from jaxpref.objectives import from_loss, self_refine
from tests.test_training import few_steps, pairs  # noqa: F401
from tests.tiny import step_on_margins

DPO = functools.partial(losses.dpo, beta=0.5)
UNIT = functools.partial(losses.dpo, beta=1.0)


def gradient(margins, right):
    """The derivative of the mean loss of margins s * m at s = 1, by hand."""
    return np.mean(margins * ((1 - right) * expit(margins) - right * expit(-margins)))


def test_the_least_certain_pairs_get_soft_labels():
    objective = self_refine(UNIT, smoothing=0.2, share=0.25, memory=8)
    first = np.array([2.0, -1.0, 0.5, 3.0, 1.0, 4.0, 5.0, 6.0])
    found, state, metrics = step_on_margins(objective, first, objective.init(0))
    np.testing.assert_allclose(found, gradient(first, 1.0), rtol=1e-5)
    assert metrics["noise/uncertain"] == 0
    assert sorted(state["logits"].tolist()) == sorted(first.tolist())
    second = np.array([0.625, 0.9375, -3.0, 2.0])
    limit = np.quantile(first, 0.25)
    assert 0.625 < limit < 0.9375
    found, state, metrics = step_on_margins(objective, second, state)
    right = np.where(second > limit, 1.0, 0.8)
    np.testing.assert_allclose(found, gradient(second, right), rtol=1e-5)
    assert metrics["noise/uncertain"] == 0.5
    # The oldest four are gone.
    assert sorted(state["logits"].tolist()) == sorted([*first[4:], *second])


def test_of_a_large_batch_the_last_pairs_are_remembered():
    objective = self_refine(UNIT, memory=3)
    margins = np.array([1.0, np.nan, 2.0, 3.0, 4.0, np.nan, 5.0])
    _, state, _ = step_on_margins(objective, margins, objective.init(0))
    assert sorted(state["logits"].tolist()) == [3, 4, 5]
    for n in range(20):
        _, state, _ = step_on_margins(objective, np.array([n + 0.5]), state)
    assert sorted(state["logits"].tolist()) == [17.5, 18.5, 19.5]


def test_without_smoothing_it_is_the_loss(pairs):  # noqa: F811
    base, _ = few_steps(pairs, objective=from_loss(losses.dpo, beta=0.5))
    objective = self_refine(DPO, smoothing=0.0, memory=1)
    found, _ = few_steps(pairs, objective=objective)
    np.testing.assert_allclose(found, base, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{"smoothing": 0.6}, {"share": 1.0}, {"memory": 0}], ids=str
)
def test_wrong_options_are_named(options):
    with pytest.raises(InputError, match=f"self_refine: {next(iter(options))}"):
        self_refine(UNIT, **options)
