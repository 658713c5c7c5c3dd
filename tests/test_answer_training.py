"""Runs on labeled answers and on lists: layouts, accumulation, devices and resume."""

import functools

import numpy as np
import pytest

from jaxpref import data
from jaxpref.data import DataOptions
from jaxpref.errors import InputError
from jaxpref.objectives import (
    apo_zero_unpaired,
    bco,
    irpo,
    kto,
    lipo_lambda,
    plackett_luce,
)
from jaxpref.train import (
    Decay,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    read_metrics,
    run,
)
from tests.answers import labeled_records, list_records, write_records
from tests.tiny import make_model_folder

OBJECTIVES = {
    "kto": kto(beta=0.5),
    "bco": bco(beta=0.5),
    "apo_zero_unpaired": apo_zero_unpaired(beta=0.5),
    "plackett_luce": plackett_luce(beta=0.5),
    "lipo_lambda": lipo_lambda(beta=0.5),
    "irpo": irpo(beta=0.5),
}
FIRST_LOSS = {
    # Where policy and reference agree.
    "kto": 0.5,
    "bco": np.log(2),
    "apo_zero_unpaired": 0.5,
}
FAST = {"kto"}
SLOW = [
    pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in OBJECTIVES
]
WEIGHTS = "export/model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    make_model_folder(folder / "model")
    write_records(folder / "labeled.jsonl", labeled_records())
    write_records(folder / "lists.jsonl", list_records())
    return folder


def config_for(folder, out, name, **changes):
    objective = OBJECTIVES[name]
    file = "lists" if objective.kind.sides is None else "labeled"
    defaults = dict(
        model=str(folder / "model"),
        data=str(folder / f"{file}.jsonl"),
        out=str(out),
        objective=objective,
        optimizer=OptimizerConfig(learning_rate=1e-2, decay=Decay.CONSTANT),
        options=DataOptions(max_length=32, heldout_fraction=0.2),
        mesh=MeshConfig(data=1),
        max_steps=3,
        batch_size=8,
        row_length="none",
        save_every=9,
        log_every=1,
        eval_every=3,
    )
    return TrainConfig(**(defaults | changes))


def logged(out, name="loss"):
    lines = read_metrics(out / "metrics.jsonl")
    return np.array([line[name] for line in lines if name in line])


@pytest.mark.parametrize("name", SLOW)
def test_layouts_and_accumulation_change_nothing_but_rounding(name, made, tmp_path):
    both: dict = {}
    changes: dict = {"row_length": 64, "accumulation": 4}
    if name == "lipo_lambda":
        # Its weights follow the ranks of rewards that are all 0 in the first step, up
        # to rounding, which packed rows change.  Padded rows must divide the devices.
        both, changes["row_length"] = {"batch_size": 32}, "none"
    run(config_for(made, tmp_path / "whole", name, **both))
    run(config_for(made, tmp_path / "packed", name, **both, **changes))
    expected = logged(tmp_path / "whole")
    assert expected.shape == (3,)
    if name in FIRST_LOSS:
        assert expected[0] == pytest.approx(FIRST_LOSS[name], abs=1e-5)
    assert np.ptp(expected) > 1e-3
    # float32 sums in another order; Adam's first steps amplify them.
    np.testing.assert_allclose(logged(tmp_path / "packed"), expected, rtol=2e-4)
    for key in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"):
        whole, packed = (logged(tmp_path / x, key) for x in ("whole", "packed"))
        assert len(whole) == 2 and (key != "eval_loss" or whole[0] != whole[1])
        np.testing.assert_allclose(packed, whole, rtol=2e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_devices_change_nothing_but_rounding(name, made, tmp_path):
    run(config_for(made, tmp_path / "one", name))
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    run(config_for(made, tmp_path / "eight", name, mesh=mesh))
    one, eight = (logged(tmp_path / x) for x in ("one", "eight"))
    np.testing.assert_allclose(eight, one, rtol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kto", "bco", "lipo_lambda"])
def test_a_resumed_run_has_the_same_bits(name, made, tmp_path):
    config = functools.partial(config_for, made, name=name)
    run(config(tmp_path / "whole", max_steps=4))
    run(config(tmp_path / "parts", max_steps=2))
    run(config(tmp_path / "parts", max_steps=4))
    whole, parts = ((tmp_path / x / WEIGHTS).read_bytes() for x in ("whole", "parts"))
    assert whole == parts
    np.testing.assert_array_equal(
        logged(tmp_path / "whole"), logged(tmp_path / "parts")
    )


def test_lists_of_two_files_may_have_different_lengths(made, tmp_path):
    write_records(tmp_path / "long.jsonl", list_records(12, seed=5, most=6))
    tokenizer = data.load_tokenizer(made / "model")
    datasets = data.read_datasets(
        tokenizer,
        DataOptions(max_length=32),
        kind=lipo_lambda().kind,
        mix=None,
        train=str(made / "lists.jsonl"),
        heldout=str(tmp_path / "long.jsonl"),
    )
    sets = (datasets.splits.train, datasets.splits.heldout)
    assert [x.num_completions for x in sets] == [6, 6]
    layout = data.padded_layout(*sets, batch_size=4)
    batch = next(iter(layout.eval_batches(sets[0])))
    assert batch.numbers["qualities"].shape == (1, 4, 1, 6)
    abstract = layout.abstract_batch(numbers=["qualities"])
    assert abstract.numbers["qualities"].shape == (1, 4, 1, 6)


def test_labels_of_the_wrong_kind_are_refused(made, tmp_path):
    options = DataOptions(columns=("desirable=thumb",))
    assert config_for(made, tmp_path, "kto", options=options)
    with pytest.raises(InputError, match="lipo_lambda does not read it"):
        config_for(made, tmp_path, "lipo_lambda", options=options)
