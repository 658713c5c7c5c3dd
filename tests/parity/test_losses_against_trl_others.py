"""Losses against TRL 1.16: the trainers beside DPO's.  For the table of what TRL does
otherwise, see `test_losses_against_trl`.
"""

import dataclasses
import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl", "1.16", reason="needs TRL 1.16")

import jax.numpy as jnp

from jaxpref import losses
from tests.parity import trl_losses as trl
from tests.parity.trl_losses import (
    DTYPES,
    Case,
    assert_agree,
    dtypes_of,
    likelihood,
    mean,
    our_loss,
    ours,
    theirs,
)

pytestmark = pytest.mark.parity


# KTO.


def kto_objective(loss, **options):
    if loss == "apo_zero_unpaired":
        return mean(losses.apo_zero_unpaired, **options)

    def objective(
        policy_logps,
        reference_logps,
        desirable,
        policy_mismatched_logps,
        reference_mismatched_logps,
    ):
        kl = losses.kto_kl(policy_mismatched_logps, reference_mismatched_logps)
        return jnp.mean(
            losses.kto(policy_logps, reference_logps, desirable, kl, **options)
        )

    return objective


KTO_OPTIONS = (
    {"beta": 0.1},
    {"beta": 1.0, "desirable_weight": 1.33, "undesirable_weight": 0.7},
    {"beta": 0.01, "undesirable_weight": 0.0},
)
LABELS = {"mixed": (1, 0, 0, 1, 0, 0), "desirable": (1,) * 6, "undesirable": (0,) * 6}


def kto_batch(seed, dtype, labels, **options):
    made = [trl.draw(seed + i, 3, dtype, **options) for i in range(2)]
    return *made, torch.tensor(LABELS[labels], dtype=torch.bool)


def kto_loss(parts, **options):
    made = trl.kto_trainer(*parts[:2], **options)
    return theirs(made, trl.kto_inputs(*parts), parts[0].policy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("labels", LABELS)
def test_kto(dtype, labels):
    points = []
    for options in KTO_OPTIONS:
        for seed, far in ((10, 0.0), (12, 0.0), (14, 2.5)):
            parts = kto_batch(seed, dtype, labels, far=far)
            if set(LABELS[labels]) == {0} and not options.get("undesirable_weight", 1):
                continue
            arrays, leaf = trl.kto_arrays(*parts), parts[0].policy
            wanted = kto_loss(parts, **options)
            assert_agree(
                ours(kto_objective("kto", **options), arrays, leaf), wanted, dtype
            )
            second = (
                arrays["policy_mismatched_logps"] - arrays["reference_mismatched_logps"]
            )
            points.append(float(second.mean()))
    assert min(points) < 0 < max(points)  # the KL is clipped at 0 in some


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("labels", LABELS)
def test_apo_zero_unpaired(dtype, labels):
    for seed, beta in ((10, 0.1), (12, 1.0)):
        parts = kto_batch(seed, dtype, labels)
        objective = kto_objective("apo_zero_unpaired", beta=beta)
        wanted = kto_loss(parts, loss_type="apo_zero_unpaired", beta=beta)
        arrays, leaf = trl.kto_arrays(*parts), parts[0].policy
        assert_agree(ours(objective, arrays, leaf), wanted, dtype)


def test_kto_drops_nan():
    parts = kto_batch(10, "float32", "mixed")
    broken = parts[0].reference.clone()
    broken[0] = float("nan")
    parts = (dataclasses.replace(parts[0], reference=broken), *parts[1:])
    value, _ = kto_loss(parts)
    assert np.isfinite(value)
    arrays, leaf = trl.kto_arrays(*parts), parts[0].policy
    assert np.isnan(ours(kto_objective("kto"), arrays, leaf)[0])


# Without a reference: CPO, SimPO, AlphaPO, ORPO, TPO.


logits = functools.partial(trl.batch, logits=True)


def free_loss(kind, tokens, **options):
    return theirs(*trl.reference_free(kind, tokens, **options), tokens.policy)


def with_zero_reference(loss, **options):
    """Converts a loss of log-ratios to one of log-probs."""

    def objective(
        policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths
    ):
        zeros = (jnp.zeros_like(policy_chosen_logps),) * 2
        lengths = (chosen_lengths, rejected_lengths)
        lengths = lengths if "chosen_lengths" in trl.reads(loss) else ()
        pair = (policy_chosen_logps, policy_rejected_logps)
        return jnp.mean(loss(*pair, *zeros, *lengths, **options))

    return objective


def free_case(loss, *, beta, gamma=None, alpha=None):
    theirs = {"loss_type": "simpo", "beta": beta, "cpo_alpha": 0.0}
    theirs |= {"simpo_gamma": gamma, "alpha": alpha or 0.0}
    ours = {"beta": beta, "gamma": gamma, "alpha": alpha}
    ours = {name: value for name, value in ours.items() if value is not None}
    if loss == "cpo":
        theirs["loss_type"] = "sigmoid"
        ours["nll_weight"] = 0.0
    return Case(theirs, loss, ours, batches=(0, 1, 2, 3))


FREE_CASES = [
    free_case("cpo", beta=0.1),
    free_case("cpo", beta=1.0),
    free_case("simpo", beta=2.0, gamma=0.5),
    free_case("simpo", beta=10.0, gamma=3.0),
    free_case("simpo", beta=2.5, gamma=0.0),
    free_case("alpha_po", beta=2.5, gamma=0.25, alpha=0.25),
    free_case("alpha_po", beta=2.5, gamma=0.5, alpha=1.0),
    free_case("alpha_po", beta=2.5, gamma=0.25, alpha=-0.5),
    free_case("alpha_po", beta=2.5, gamma=0.0, alpha=-1.0),
]


@pytest.mark.parametrize("case, dtype", dtypes_of(FREE_CASES))
def test_cpo_trainer(case, dtype):
    objective = mean(getattr(losses, case.loss), **case.options)
    for index in range(5):
        tokens = logits(index, dtype)
        wanted = free_loss("cpo", tokens, **case.trl)
        assert_agree(our_loss(tokens, objective), wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [1.0, 0.2])
def test_cpo_nll(dtype, weight):
    def of_the_batch(policy_chosen_logps, policy_rejected_logps, chosen_lengths):
        arrays = (policy_chosen_logps, policy_rejected_logps, chosen_lengths)
        pairs = jnp.mean(losses.cpo(*arrays, nll_weight=0.0))
        return pairs + weight * likelihood(policy_chosen_logps, chosen_lengths)

    of_answers = mean(losses.cpo, nll_weight=weight)
    tokens = logits(2, dtype)
    wanted = free_loss("cpo", tokens, cpo_alpha=weight)
    assert_agree(our_loss(tokens, of_the_batch), wanted, dtype)
    assert abs(our_loss(tokens, of_answers)[0] / wanted[0] - 1) > 1e-3
    tokens = logits(2, dtype, lengths=(5, 5))  # equally long: no difference
    wanted = free_loss("cpo", tokens, cpo_alpha=weight)
    assert_agree(our_loss(tokens, of_answers), wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpo_smoothing_and_other_losses(dtype):
    objectives = {
        "sigmoid": with_zero_reference(losses.cdpo, beta=0.3, flip_rate=0.2),
        "hinge": with_zero_reference(losses.hinge, beta=0.3),
        "ipo": with_zero_reference(losses.ipo_averaged, beta=0.3),
    }
    tokens = logits(2, dtype)
    for loss_type, objective in objectives.items():
        options = {"loss_type": loss_type, "beta": 0.3, "cpo_alpha": 0.0}
        wanted = free_loss("cpo", tokens, label_smoothing=0.2, **options)
        assert_agree(our_loss(tokens, objective), wanted, dtype)


def test_simpo_has_a_likelihood_by_default():
    tokens = logits(2, "float32")
    options = {"loss_type": "simpo", "beta": 2.0}
    value, _ = free_loss("cpo", tokens, **options)
    alone, _ = free_loss("cpo", tokens, cpo_alpha=0.0, **options)
    np.testing.assert_allclose(
        our_loss(tokens, mean(losses.simpo))[0], alone, rtol=1e-6
    )
    objective = lambda policy_chosen_logps, chosen_lengths: likelihood(
        policy_chosen_logps, chosen_lengths
    )
    np.testing.assert_allclose(value, alone + our_loss(tokens, objective)[0], rtol=1e-6)


def test_alpha_po_of_improbable_answers():
    with pytest.raises(ValueError, match="Unknown loss type"):
        free_loss("cpo", logits(2, "float32"), loss_type="alphapo", alpha=0.25)
    tokens = logits(2, "float32")
    steep = (400 * tokens.policy.detach()).requires_grad_()
    tokens = dataclasses.replace(tokens, policy=steep)
    options = {"loss_type": "simpo", "cpo_alpha": 0.0, "alpha": 0.25}
    value, gradient = free_loss("cpo", tokens, **options)
    assert np.isnan(value) and np.isnan(gradient).any()
    value, gradient = our_loss(tokens, mean(losses.alpha_po))
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo(dtype, beta):
    def with_prompt(
        policy_chosen_logps,
        policy_rejected_logps,
        chosen_lengths,
        rejected_lengths,
        whole_chosen_logps,
        whole_chosen_lengths,
    ):
        pairs = losses.orpo(
            policy_chosen_logps,
            policy_rejected_logps,
            chosen_lengths,
            rejected_lengths,
            beta=beta,
        )
        # TRL uses the likelihood of prompts and answers instead of answers.
        pairs = pairs + losses.average_logps(policy_chosen_logps, chosen_lengths)
        return jnp.mean(pairs) + likelihood(whole_chosen_logps, whole_chosen_lengths)

    of_answers = mean(losses.orpo, beta=beta)
    rtol = trl.RTOL["float32"]  # TRL's preference term is always float32
    for index in range(5):
        tokens = logits(index, dtype, prompts=(2, 5))
        wanted = free_loss("orpo", tokens, beta=beta)
        assert_agree(our_loss(tokens, with_prompt), wanted, rtol=rtol)
        assert abs(our_loss(tokens, of_answers)[0] / wanted[0] - 1) > 1e-3
        # The first token is never predicted, so a prompt of one token counts as none.
        tokens = logits(index, dtype, prompts=(1, 1), lengths=(5, 5))
        wanted = free_loss("orpo", tokens, beta=beta)
        assert_agree(our_loss(tokens, of_answers), wanted, rtol=rtol)


def test_orpo_certain():
    tokens = logits(2, "float32")
    sure = tokens.policy.detach().clone()
    following = tokens.ids[0].roll(-1)
    sure[0] = 1e3 * torch.nn.functional.one_hot(following, trl.VOCABULARY)
    tokens = dataclasses.replace(tokens, policy=sure.requires_grad_())
    assert tokens.arrays["policy_chosen_logps"][0] == 0
    _, gradient = free_loss("orpo", tokens)
    assert np.isnan(gradient).any()
    value, gradient = our_loss(tokens, mean(losses.orpo))
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tpo(dtype):
    """DPO without a reference, or SimPO, plus the likelihood of a gold answer."""
    options = {"loss_type": "sigmoid", "beta": 0.3}
    cpo = functools.partial(losses.cpo, beta=0.3, nll_weight=0.0)

    def gold(
        policy_chosen_logps,
        policy_rejected_logps,
        chosen_lengths,
        policy_gold_logps,
        gold_lengths,
    ):
        arrays = (policy_chosen_logps, policy_rejected_logps, chosen_lengths)
        pairs = jnp.mean(cpo(*arrays))
        return pairs + 0.7 * likelihood(policy_gold_logps, gold_lengths)

    for index in range(5):
        tokens = logits(index, dtype, branches=3)
        trainer = trl.tpo_trainer(tokens, tpo_alpha=0.7, **options)
        wanted = theirs(trainer, tokens.inputs, tokens.policy)
        assert_agree(our_loss(tokens, gold), wanted, dtype)
        tokens = logits(index, dtype)
        trainer = trl.tpo_trainer(
            tokens, tpo_alpha=0.0, loss_type="tpo-l", beta=2.0, tpo_l_gamma=0.8
        )
        wanted = theirs(trainer, tokens.inputs, tokens.policy)
        objective = mean(losses.simpo, beta=2.0, gamma=0.8)
        assert_agree(our_loss(tokens, objective), wanted, dtype)


# Reward models.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coefficient", [None, 0.01, 1.0])
@pytest.mark.parametrize("margin", [False, True])
def test_reward_trainer(dtype, coefficient, margin):
    def objective(chosen_rewards, rejected_rewards, preference_margins):
        pair = (chosen_rewards, rejected_rewards)
        value = losses.bradley_terry(*pair)
        if margin:
            value = losses.margin_bradley_terry(*pair, preference_margins)
        if coefficient is not None:
            value = value + coefficient * losses.center_rewards(*pair)
        return jnp.mean(value)

    for pairs, scale in ((1, 3.0), (2, 3.0), (8, 3.0), (8, 1000.0)):
        rng = np.random.default_rng(pairs)
        rewards = torch.tensor(
            trl.exact(rng, -scale, scale, (2 * pairs, 1)), dtype=trl.TORCH[dtype]
        ).requires_grad_()
        margins = torch.tensor(trl.exact(rng, 0, 3, pairs), dtype=rewards.dtype)
        inputs = {"attention_mask": torch.ones(2 * pairs, 4)}
        trainer = trl.reward_trainer(rewards, center_rewards_coefficient=coefficient)
        wanted = theirs(
            trainer, inputs | ({"margin": margins} if margin else {}), rewards
        )
        chosen, rejected = rewards[:, 0].chunk(2)
        arrays = {
            "chosen_rewards": chosen,
            "rejected_rewards": rejected,
            "preference_margins": margins,
        }
        assert_agree(ours(objective, arrays, rewards), wanted, dtype)


def test_reward_ties():
    rewards = torch.tensor([[1.0], [2.0], [3.0], [1.0], [0.0], [4.0]])
    trainer = trl.reward_trainer(rewards.requires_grad_())
    theirs(trainer, {"attention_mask": torch.ones(6, 4)}, rewards)
    (accuracy,) = trainer._metrics["train"]["accuracy"]
    chosen, rejected = rewards.detach().numpy()[:, 0].reshape(2, 3)
    right = losses.reward_accuracies(jnp.asarray(chosen), jnp.asarray(rejected))
    assert right.tolist() == [0.5, 1, 0]
    np.testing.assert_allclose(accuracy, 1 / 3, rtol=1e-6)
