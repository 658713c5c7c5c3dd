"""docs/losses.md is up to date, and its measurements match closed forms."""

import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.special import logit

from jaxpref import losses
from jaxpref.cli.objectives import LOSSES
from jaxpref.cli.train import config_of
from jaxpref.cli.words import split

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "make_loss_table.py"


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_page_is_up_to_date(maker):
    new, page = maker.page().splitlines(), maker.PAGE.read_text("utf-8").splitlines()
    changed = [f"- {a}\n+ {b}" for a, b in zip(page, new) if a != b]
    hint = "run `python docs/make_loss_table.py`\n" + "\n".join(changed[:5])
    assert new == page, hint


def test_every_function_is_on_the_page_once():
    page = SCRIPT.with_name("losses.md").read_text("utf-8")
    assert {
        name: page.count(f"[`{name}`]") for name in losses.__all__
    } == dict.fromkeys(losses.__all__, 1)


def test_the_readme_does_not_overstate_their_number(maker):
    readme = (SCRIPT.parents[1] / "README.md").read_text("utf-8")
    (number,) = re.findall(r"More than (\d+) losses", readme)
    entries = [maker.Entry(getattr(losses, name)) for name in losses.__all__]
    assert sum(entry.is_loss for entry in entries) > int(number)


def test_every_loss_has_a_command_or_a_reason(maker):
    entries = [maker.Entry(getattr(losses, name)) for name in losses.__all__]
    of_losses = {entry.name for entry in entries if entry.is_loss}
    assert of_losses - LOSSES.keys() == maker.NOT_TRAINED.keys()
    assert LOSSES.keys() <= of_losses
    page = SCRIPT.with_name("losses.md").read_text("utf-8")
    for entry in entries:
        if entry.is_loss:
            assert "| " + " | ".join(maker.trained(entry)) + " |" in page


def test_the_commands_of_the_page_are_valid(maker):
    for name in LOSSES:
        argv = [*maker.flags_of(name), *"--model x --data x --out x".split()]
        config = config_of(split(argv))
        assert config.objective.name == name
        assert config.objective.kind == maker.objective_of(name)[0].kind


CLEAN, OBSERVED = 0.8, 0.62
LEARNED = {
    # Closed forms at P(w > l) = .8 and a flip rate of .3.
    "dpo": (10 * logit(CLEAN), 10 * logit(OBSERVED)),
    "cdpo": (10 * logit(CLEAN), 10 * logit(0.7 * OBSERVED + 0.3 * (1 - OBSERVED))),
    "rdpo": (10 * logit(CLEAN), 10 * logit(CLEAN)),
    "forward_dpo": (10 * logit(CLEAN), 10 * logit(CLEAN)),
    "ipo": (5 * (2 * CLEAN - 1), 5 * (2 * OBSERVED - 1)),
    "bradley_terry": (logit(CLEAN), logit(OBSERVED)),
    "hinge": (20, 20),
    "sympo_ramp": (10, 10),
    "sympo_sigmoid": (np.inf, np.inf),
    "center_rewards": (0, 0),
}


@pytest.mark.parametrize("name", LEARNED)
def test_margins_learned_are_the_closed_forms(maker, name):
    with jax.enable_x64(True):
        learned = maker.margins_learned(maker.Entry(getattr(losses, name)))
    np.testing.assert_allclose(learned, LEARNED[name], rtol=1e-4)


FAR_OUT = {
    "dpo": ("below", "x 2"),
    "ipo": ("below", "grows"),
    "rdpo": ("no", "x 1.4"),  # 1 + e / (1 - 2e) over 1/2 + e / (1 - 2e)
    "forward_dpo": ("below and above", "-> 0"),
    "hinge": ("below", "x 1"),
    "center_rewards": ("below", "0"),
    "forward_kl_dpo": ("below", "grows"),
}


@pytest.mark.parametrize("name", FAR_OUT)
def test_bounds_and_gradients_far_out(maker, name):
    with jax.enable_x64(True):
        assert maker.far_out(maker.Entry(getattr(losses, name))) == FAR_OUT[name]


def test_losses_without_reference_arrays_need_no_reference(maker):
    of_pairs = [maker.Entry(getattr(losses, name)) for name in losses.__all__]
    of_pairs = [entry for entry in of_pairs if entry.is_of_pairs]
    assert not any(e.needs_reference for e in of_pairs if e.is_of_rewards)
    policies = {e.name for e in of_pairs if not e.is_of_rewards}
    free = {e.name for e in of_pairs if not e.is_of_rewards and not e.needs_reference}
    assert free == {"alpha_po", "cpo", "gamma_simpo", "mapo", "orpo", "simpo"}
    assert {"dove", "sparse_po", "wpo"} <= policies - free


def test_source_is_the_first_reference(maker):
    paper, equation = maker.Entry(losses.dpo).source
    assert paper.endswith("2023, [2305.18290](https://arxiv.org/abs/2305.18290)")
    assert equation == "7"
    assert maker.Entry(losses.reward_margins).source == ("", "")
