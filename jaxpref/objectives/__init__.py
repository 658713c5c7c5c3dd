"""What a run minimizes: losses with state, and what is learned with the model."""

from jaxpref.objectives.auto import auto as auto
from jaxpref.objectives.beta_dpo import beta_dpo as beta_dpo
from jaxpref.objectives.bound_loss import PER_RECORD as PER_RECORD
from jaxpref.objectives.bound_loss import Loss as Loss
from jaxpref.objectives.co_training import crm as crm
from jaxpref.objectives.corrected import forward as forward
from jaxpref.objectives.corrected import unbiased as unbiased
from jaxpref.objectives.degrees import spo as spo
from jaxpref.objectives.distillation import align_distil as align_distil
from jaxpref.objectives.goal_contrast import (
    goal_contrast as goal_contrast,
)
from jaxpref.objectives.hypo import hypo as hypo
from jaxpref.objectives.inputs import Inputs as Inputs
from jaxpref.objectives.instance_noise import instance_noise as instance_noise
from jaxpref.objectives.learned_noise import em as em
from jaxpref.objectives.learned_noise import em_weighted as em_weighted
from jaxpref.objectives.learned_noise import learned_rate as learned_rate
from jaxpref.objectives.learned_noise import re_po as re_po
from jaxpref.objectives.lists import irpo as irpo
from jaxpref.objectives.lists import lipo_lambda as lipo_lambda
from jaxpref.objectives.lists import plackett_luce as plackett_luce
from jaxpref.objectives.more import more as more
from jaxpref.objectives.objective import GradientProbe as GradientProbe
from jaxpref.objectives.objective import Objective as Objective
from jaxpref.objectives.objective import from_loss as from_loss
from jaxpref.objectives.objective import trainable as trainable
from jaxpref.objectives.policy_gradient import dapo as dapo
from jaxpref.objectives.policy_gradient import dr_grpo as dr_grpo
from jaxpref.objectives.policy_gradient import gpo_online as gpo_online
from jaxpref.objectives.policy_gradient import grpo as grpo
from jaxpref.objectives.policy_gradient import reinforce as reinforce
from jaxpref.objectives.policy_gradient import rloo as rloo
from jaxpref.objectives.policy_gradient import sppo_online as sppo_online
from jaxpref.objectives.ppo import ppo_clip as ppo_clip
from jaxpref.objectives.rationale import rationale as rationale
from jaxpref.objectives.self_refine import self_refine as self_refine
from jaxpref.objectives.supervised import (
    attribute_regression as attribute_regression,
)
from jaxpref.objectives.supervised import reward_regression as reward_regression
from jaxpref.objectives.supervised import sft as sft
from jaxpref.objectives.token_masks import sparse_po as sparse_po
from jaxpref.objectives.trace_mixture import bvpo as bvpo
from jaxpref.objectives.unpaired import apo_zero_unpaired as apo_zero_unpaired
from jaxpref.objectives.unpaired import bco as bco
from jaxpref.objectives.unpaired import kto as kto

FACTORIES = (
    align_distil,
    apo_zero_unpaired,
    attribute_regression,
    bco,
    beta_dpo,
    irpo,
    kto,
    lipo_lambda,
    plackett_luce,
    reward_regression,
    sft,
    sparse_po,
)
"""`make(**options)`: losses whose objective is not their mean over the pairs."""

WRAPPERS = (
    auto,
    crm,
    em,
    em_weighted,
    goal_contrast,
    instance_noise,
    learned_rate,
    more,
    rationale,
    re_po,
    self_refine,
    spo,
)
"""`wrap(loss, **options)`: learn something besides the model, for a pairwise loss."""

CORRECTIONS = (unbiased, forward)
"""`correct(loss, flip_rate=...)`: losses that correct for wrong labels."""

MIXTURES = (bvpo,)
"""`mix(objective, **options)`: gradients of groups of pairs, mixed."""

SAMPLED = (
    *(dapo, dr_grpo, gpo_online, grpo, hypo, ppo_clip, reinforce, rloo),
    sppo_online,
)
"""`make(**options)`: learn from answers that are sampled in training."""
