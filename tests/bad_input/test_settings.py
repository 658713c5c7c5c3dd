"""Settings under which nothing can be learned: not 0 and "exported"."""

import sys

import numpy as np
import pytest

from jaxpref import cli
from jaxpref.errors import InputError, Stopped
from jaxpref.runtime.fingerprint import fingerprint
from jaxpref.train import Decay, OptimizerConfig
from jaxpref.train.guard import Guard
from jaxpref.train.optimizer import make_schedule
from tests.tiny import make_pairs_file


@pytest.fixture
def stopped(monkeypatch, capfd):
    """Runs a command line that must end with code 65; returns the last line."""

    def run(argv):
        monkeypatch.setattr(sys, "argv", ["jaxpref", *argv])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 65
        return capfd.readouterr().err.splitlines()[-1]

    return run


SKIPPED = "every step was skipped"
UNCHANGED = "no weight has changed"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--learning-rate", 1e38, "--max-grad-norm", 0], SKIPPED),
        pytest.param(["--weight-decay", 3e38], SKIPPED, marks=pytest.mark.slow),
        pytest.param(["--loss.beta", 1e38], SKIPPED, marks=pytest.mark.slow),
        pytest.param(["--learning-rate", 1e-30], UNCHANGED, marks=pytest.mark.slow),
        pytest.param(["--adam-eps", 1e38], UNCHANGED, marks=pytest.mark.slow),
        pytest.param(["--max-grad-norm", 1e-38], UNCHANGED, marks=pytest.mark.slow),
        pytest.param(["--loss.beta", 1e-30], UNCHANGED, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_changes_nothing(inputs, stopped, options, why):
    line = stopped(inputs.train("--export", "last", *options))
    assert why in line and "nothing was learned" in line, line
    assert not (inputs.out / "export").exists()
    # Nor does the same command claim success when it resumes.
    assert why in stopped(inputs.train("--export", "last", *options))


@pytest.mark.parametrize(
    ("skipped", "changed", "why"),
    [(4, False, SKIPPED), (3, False, UNCHANGED), (0, False, UNCHANGED), (3, True, "")],
)
def test_the_reason(skipped, changed, why):
    guard = object.__new__(Guard)
    if changed:
        guard.check_learned(4, skipped, changed)
        return
    with pytest.raises(Stopped, match=why) as stopped:
        guard.check_learned(4, skipped, changed)
    wanted = "lower" if why == SKIPPED else "higher"
    assert f"a {wanted} --learning-rate" in str(stopped.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_the_fingerprint_sees_every_bit(dtype):
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    params = {"a": rng.integers(-9, 9, (4, 5)), "b": rng.integers(-9, 9, 7)}
    params = {name: jnp.asarray(x, dtype) for name, x in params.items()}
    before = fingerprint(params)
    assert fingerprint(dict(params)) == before
    for changed in (
        params | {"a": params["a"].at[2, 3].add(1)},
        params | {"b": params["b"].at[0].multiply(-2).at[1].add(3)},
        params | {"a": params["a"][::-1] + 0, "b": -params["b"]},
    ):
        assert fingerprint(changed) != before


@pytest.mark.parametrize("decay", Decay)
@pytest.mark.parametrize(
    ("warmup", "steps", "fits"),
    [(0, 1, True), (1, 1, True), (10, 10, True), (11, 10, False), (2, 1, False)],
)
def test_a_warm_up_that_never_ends(decay, warmup, steps, fits):
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=warmup, decay=decay)
    if not fits:
        message = f"warmup_steps {warmup}: the run has {steps} steps"
        with pytest.raises(InputError, match=message):
            make_schedule(config, steps)
        return
    rates = [float(make_schedule(config, steps)(step)) for step in range(steps)]
    # The rate is reached, after the warm-up or in the only step.
    assert max(rates) == pytest.approx(0.5)


def test_a_warm_up_longer_than_the_epochs(inputs, refuse):
    settings = inputs.train("--epochs", 0.5, "--warmup-steps", 7)
    at = settings.index("--max-steps")
    del settings[at : at + 2]
    # 64 pairs, a fifth of the prompts held out: 3 or 4 steps of 8 pairs.
    refuse(settings, "warmup_steps 7", "would never reach its learning rate")
    assert not (inputs.out / "config.json").exists()


@pytest.mark.parametrize("pairs, size", [(4, 8), (9, 16), (1, 2)])
def test_a_batch_larger_than_the_data(inputs, refuse, pairs, size):
    make_pairs_file(inputs.data, count=pairs)
    argv = inputs.train("--heldout-fraction", 0, "--batch-size", size)
    refuse(argv, f"batch_size {size}", f"only {pairs} to train on", "--batch-size")
