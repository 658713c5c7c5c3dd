"""The experiment on `auto`: its batches, and one of its claims."""

import numpy as np
import pytest

from experiments import auto_objective as experiment
from experiments import heterogeneous_world as worlds
from jaxpref.objectives.flip_features import flip_features
from jaxpref.objectives.inputs import Inputs


def test_a_batch_has_the_lengths_and_annotators_of_its_pairs():
    world = experiment.make_world(0, 0.5)
    assert np.corrcoef(world.reward, world.log_length)[0, 1] == pytest.approx(
        0.5, abs=0.05
    )
    pairs = worlds.draw_pairs(world, 64, worlds.half_by_length, 0)
    batch, of_pairs = experiment.as_batch(pairs)
    found = flip_features({"length": 1.0}).read(Inputs({}, batch)).odd
    np.testing.assert_allclose(found[:, 0, 0], pairs.length, atol=1e-3)
    assert batch.annotator[:, 0].tolist() == pairs.annotator.tolist()
    np.testing.assert_allclose(of_pairs["x"], pairs.features, rtol=1e-6)


@pytest.mark.slow
def test_auto_recovers_what_an_annotator_who_goes_by_length_costs():
    cell = "half by length", 0.5, 2048, 0.05, 0
    share = lambda method: experiment.measure(method, *cell)["share_of_best_possible"]
    assert experiment.measure("auto", *cell)["model"] == "both"
    assert share("dpo") + 0.05 < share("auto") > share("known rates") - 0.05
