"""SparsePO: masks that weight the reward and the divergence of each token."""

from typing import Literal

from jaxtyping import Array

from jaxpref import losses
from jaxpref.errors import InputError
from jaxpref.objectives.bound_loss import arrays_of, check_options
from jaxpref.objectives.inputs import Inputs, mean_over
from jaxpref.objectives.objective import Metrics, Objective, State
from jaxpref.objectives.rewards import reward_metrics
from jaxpref.scoring.scores import TokenMasks

LEARNED = {"independent": 2, "common": 1, "activations": 0}
"""How many masks are learned."""
SIDES = ("chosen", "rejected")


def sparse_po(
    *,
    masks: Literal["independent", "common", "activations"] = "independent",
    reward_l1: float = 0.0,
    kl_l1: float = 0.0,
    beta: float = 0.1,
) -> Objective:
    """SparsePO: token-level DPO with masks that weight each token's reward and KL.

        loss = -log s(beta (u - d)) + reward_l1 sum_t m_u(t) + kl_l1 sum_t m_d(t)
        u    = sum_t m_u(t) log pi(t)/ref(t) over y_w, minus the same over y_l
        d    = sum_t m_d(t) KL(ref || pi)(t) over y_l, minus the same over y_w

    The sums of the masks are over both answers.  Learned masks are those of heads on
    all layers of the reference, trained with the policy at the same learning rate:

        m_l = ReLU(LN(h_l) w_l + b_l),  m = ReLU(sum_l a_l m_l)

    They begin at about 1, with which the loss is that of TDPO1; the authors draw all
    weights at random, also apply dropout, and LN has a gain and an offset, which w_l
    and b_l make up for.  Masks of activations (the paper's MaPO) have no parameters:
    the mean over the features of the residual stream after each layer, rescaled to
    [0, 1] for each answer and averaged over the layers.  The authors also average over
    activations within the layers.

    Metrics: `sparse_po/reward_mask` and `sparse_po/kl_mask`, the mean mask of a token;
    `sparse_po/zero`, the share of tokens whose reward has mask 0.

    Args:
      masks: independent for two learned masks, m_u and m_d; common for one; activations
        for one that is not learned.
      reward_l1: weight of the sum of m_u, >= 0; for learned masks.
      kl_l1: the same for m_d; the authors' weights are 0 or 0.001.
      beta: inverse temperature of the KL penalty, > 0.

    Raises:
      InputError: if an option is out of range, or masks without parameters would be
        penalized.

    References:
      Christopoulou et al., "SparsePO: Controlling Preference Alignment of LLMs via
      Sparse Token Masks", 2024, arXiv:2410.05102.
      Code: huawei-noah/HEBO, SparsePO, with `simple_all` and `zn_rescale`.
    """
    _check(masks, {"reward_l1": reward_l1, "kl_l1": kl_l1})
    arrays = arrays_of(losses.sparse_po)
    check_options(losses.sparse_po, {"beta": beta})
    both = lambda name: tuple(name.replace("*", side) for side in SIDES)
    of_pairs = (
        *both("policy_*_logps"),
        *both("reference_*_logps"),
        # These keep the reference in memory.
        *both("*_kls"),
    )

    def pair_losses(inputs: Inputs, state: State) -> Array:
        del state
        value = losses.sparse_po(*inputs.arrays(arrays), beta=beta)
        for name, weight in (("reward", reward_l1), ("kl", kl_l1)):
            if weight:
                chosen, rejected = inputs.arrays(both(f"*_{name}_mask_sums"))
                value += weight * (chosen + rejected)
        return value

    def learn(inputs: Inputs, state: State) -> tuple[State, Metrics]:
        real = inputs.is_pair[..., None]
        mean = lambda name: mean_over(
            inputs.completions(name) / inputs.completions("lengths"), real
        )
        return state, {
            "sparse_po/reward_mask": mean("reward_mask_sums") / 2,
            "sparse_po/kl_mask": mean("kl_mask_sums") / 2,
            "sparse_po/zero": 1 - mean("unmasked") / 2,
        }

    return Objective(
        name="sparse_po",
        options={
            "masks": masks,
            "reward_l1": reward_l1,
            "kl_l1": kl_l1,
            "beta": beta,
        },
        reads=(
            *arrays,
            *of_pairs,
            *both("*_reward_mask_sums"),
            *both("*_kl_mask_sums"),
            *both("*_unmasked"),
        ),
        losses=pair_losses,
        metrics=reward_metrics(of_pairs, {"beta": beta}, per_token=False),
        learn=learn,
        heads=TokenMasks(LEARNED[masks]),
    )


def _check(masks: str, penalties: dict[str, float]) -> None:
    for name, value in penalties.items():
        if not 0 <= value < float("inf"):
            raise InputError(f"sparse_po: {name} {value}: must be 0 or more and finite")
        if value and masks == "activations":
            raise InputError(
                f"sparse_po: {name} {value}: masks of activations are not learned; "
                "leave it out"
            )
