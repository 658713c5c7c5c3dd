"""Losses and gradients of sampled answers against TRL's own GRPO and RLOO trainers.

A trainer is made without its constructor and gets the attributes that its loss reads.
Its model is a stand-in that gives log-probabilities of the test's choosing.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from jaxpref import objectives
from jaxpref.objectives.sampled import POLICY, REFERENCE, SAMPLER
from jaxpref.scoring.scores import Scored
from jaxpref.train.gradient import gradient
from tests.sampled import padded_answers

pytestmark = pytest.mark.parity

PROMPTS, GROUP, TOKENS = 3, 4, 6
BOUNDS = {"clip_low": 0.2, "clip_high": 0.28}


def drawn(seed=0):
    """Log-probs [B, K, T] of policy, sampler and reference, mask, and rewards."""
    rng = np.random.default_rng(seed)
    shape = (PROMPTS, GROUP, TOKENS)
    policy = rng.uniform(-3, -0.2, shape)
    sampler = policy + rng.uniform(-0.5, 0.5, shape)
    reference = policy + rng.uniform(-0.5, 0.5, shape)
    lengths = rng.integers(1, TOKENS + 1, shape[:2])
    mask = np.arange(TOKENS) < lengths[..., None]
    return policy, sampler, reference, mask, rng.integers(0, 2, shape[:2]) * 1.0


def ours(objective, policy, sampler, reference, mask, rewards):
    """Loss, gradient in the policy's log-probs, and metrics; padded rows."""
    numbers = {SAMPLER: sampler, REFERENCE: reference}
    read = {name: numbers[name] for name in sorted(objective.token_numbers)}
    batch = padded_answers(mask, read, rewards)
    with jax.enable_x64(True):
        return _ours(objective, batch, np.where(mask, policy, 0))


def _ours(objective, batch, policy):
    batch = jax.tree.map(jnp.asarray, batch)
    params = jnp.asarray(policy)
    score = lambda p, micro: Scored({POLICY: p}, {})
    grads, _, metrics = gradient(objective, score, params, batch, objective.init(0))
    return jax.tree.map(np.asarray, (metrics["loss"], grads, metrics))


def stand_in(kind, **attributes):
    trainer = kind.__new__(kind)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        trainer.answer,
        torch.zeros_like(trainer.answer),
        None,
    )
    same = lambda x, **_: x
    trainer.accelerator = types.SimpleNamespace(
        gather=same, reduce=same, num_processes=1, sync_gradients=True
    )
    trainer.model = types.SimpleNamespace(training=True)
    trainer._metrics = {"train": collections.defaultdict(list)}
    trainer.args = types.SimpleNamespace(
        delta=None, use_bias_correction_kl=False, steps_per_generation=1
    )
    defaults = dict(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        max_completion_length=TOKENS,
        epsilon_low=BOUNDS["clip_low"],
        epsilon_high=BOUNDS["clip_high"],
    )
    for name, value in (defaults | attributes).items():
        setattr(trainer, name, value)
    return trainer


def theirs(trainer, policy, mask, **inputs):
    """TRL's loss and its gradient in the policy's log-probs."""
    flat = lambda x: torch.tensor(np.reshape(x, (PROMPTS * GROUP, *np.shape(x)[2:])))
    logps = flat(policy).requires_grad_()
    trainer.answer = logps
    ids = torch.zeros(PROMPTS * GROUP, 1, dtype=torch.long)
    given = {name: flat(value) for name, value in inputs.items()}
    given |= {"prompt_ids": ids, "prompt_mask": ids + 1}
    given |= {"completion_ids": flat(mask).long(), "completion_mask": flat(mask).long()}
    given["num_items_in_batch"] = torch.tensor(float(mask.sum()))
    loss = trainer._compute_loss(None, given)
    loss.backward()
    shape = (PROMPTS, GROUP, TOKENS)
    return loss.item(), logps.grad.numpy().reshape(shape), trainer._metrics["train"]


def group_advantages(rewards, *, scale):
    """As in TRL's `_generate_and_score_completions`."""
    grouped = torch.tensor(rewards)
    advantages = grouped - grouped.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (grouped.std(1, keepdim=True) + 1e-4)
    return advantages.numpy()


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(
    ("loss_type", "make"),
    [
        ("grpo", objectives.grpo),
        ("dapo", objectives.dapo),
        ("dr_grpo", objectives.dr_grpo),
    ],
)
def test_grpo(loss_type, make, beta):
    policy, sampler, reference, mask, rewards = drawn()
    rewards[:, 0] = 1 - rewards[:, 1]  # DAPO leaves out groups of equal rewards
    options = {**BOUNDS, "beta": beta}
    if loss_type == "dr_grpo":
        options["longest"] = TOKENS
    loss, grads, metrics = ours(
        make(**options), policy, sampler, reference, mask, rewards
    )
    trainer = stand_in(GRPOTrainer, loss_type=loss_type, beta=beta)
    expected, gradients, logged = theirs(
        trainer,
        policy,
        mask,
        old_per_token_logps=sampler,
        ref_per_token_logps=reference,
        advantages=group_advantages(rewards, scale=loss_type != "dr_grpo"),
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-9)
    np.testing.assert_allclose(grads, gradients, rtol=1e-9, atol=1e-15)
    (share,) = logged["clip_ratio/region_mean"]
    assert 0.1 < share < 0.9
    np.testing.assert_allclose(metrics["clipped"], share, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_rloo(beta):
    policy, sampler, reference, mask, rewards = drawn(1)
    objective = objectives.rloo(**BOUNDS, beta=beta)
    loss, grads, metrics = ours(objective, policy, sampler, reference, mask, rewards)
    # As in TRL's `_generate_and_score_completions`.
    returns = rewards - beta * ((sampler - reference) * mask).sum(-1)
    others = (returns.sum(1, keepdims=True) - returns) / (GROUP - 1)
    expected, gradients, logged = theirs(
        stand_in(RLOOTrainer, beta=beta),
        policy,
        mask,
        old_logps=(sampler * mask).sum(-1),
        advantages=returns - others,
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-9)
    np.testing.assert_allclose(grads, gradients, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(
        metrics["clipped"], logged["clip_ratio/region_mean"][0], rtol=1e-6
    )
