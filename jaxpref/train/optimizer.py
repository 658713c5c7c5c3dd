"""AdamW or Adafactor, with clipping and a learning-rate schedule, from optax."""

import dataclasses
import enum
import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxpref.errors import InputError
from jaxpref.rounding import rounded_stochastically
from jaxpref.runtime.ranges import LEAST_FLOAT32, MOST_FLOAT32


class Optimizer(enum.Enum):
    """The optimizers, which differ in the statistics they store for each weight."""

    ADAMW = "adamw"
    ADAFACTOR = "adafactor"


class Decay(enum.Enum):
    """Shape of the learning rate after the warm-up; all but CONSTANT end at 0."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule."""

    optimizer: Optimizer = Optimizer.ADAMW
    """AdamW, with two moments per weight, or Adafactor, which needs little memory.
    Adafactor (Shazeer and Stern 2018, arXiv:1804.04235, with absolute learning rates
    and no momentum) stores sums over the rows and columns of large matrices."""
    learning_rate: float = 1e-6
    """Peak learning rate.  A usual choice for DPO on all weights of an LLM is 1e-6."""
    decay: Decay = Decay.COSINE
    """Learning-rate schedule after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; norm scales are not decayed."""
    adam_b1: float = 0.9
    """AdamW's decay rate of the first moment."""
    adam_b2: float = 0.999
    """AdamW's decay rate of the second moment."""
    adam_eps: float = 1e-8
    """AdamW's epsilon, outside the square root."""
    adam_mu_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of AdamW's first moment (default: that of the parameters).  bfloat16 saves
    a quarter of the optimizer state.  The second moment changes too slowly for it and
    stays in the dtype of the parameters."""
    max_grad_norm: float = 1.0
    """Global norm to which larger gradients are scaled down; 0 turns clipping off."""

    def __post_init__(self):
        for name in ("learning_rate", "adam_eps"):
            if not LEAST_FLOAT32 <= (value := getattr(self, name)) <= MOST_FLOAT32:
                raise InputError(
                    f"{name} {value}: must be above 0 and finite, and a float32: from "
                    f"{LEAST_FLOAT32:.1e} to {MOST_FLOAT32:.1e}"
                )
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise InputError(f"{name} {value}: must be at least 0 and finite")
        for name in ("adam_b1", "adam_b2"):
            # Larger values are 1 in float32, where the bias correction divides by 0.
            if not 0 <= (value := getattr(self, name)) < 1 - 2**-24:
                raise InputError(f"{name} {value}: must be in [0, 1)")
        if self.optimizer is not Optimizer.ADAMW:
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                if field.name.startswith("adam_") and value != field.default:
                    raise InputError(
                        f"{field.name} {value}: {self.optimizer.value} does not use "
                        "it; leave it out"
                    )


def make_schedule(config: OptimizerConfig, max_steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_steps`, then decay over the remaining steps.

    Raises:
      InputError: if the warm-up is longer than the run, so the learning rate would
        never be reached.  A warning would be read after the run has been paid for.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if warmup > max_steps:
        raise InputError(
            f"warmup_steps {warmup}: the run has {max_steps} steps and would never "
            f"reach its learning rate of {peak}; give at most {max_steps}"
        )
    rest = max(max_steps - warmup, 1)
    match config.decay:
        case Decay.COSINE:
            after = optax.cosine_decay_schedule(peak, rest)
        case Decay.LINEAR:
            after = optax.linear_schedule(peak, 0.0, rest)
        case Decay.CONSTANT:
            after = optax.constant_schedule(peak)

    def schedule(step):
        step = jnp.asarray(step, float)  # int32 / int is float32 even in a float64 run
        # The first step uses peak / warmup, not 0, so that it changes the weights.
        rise = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
        return rise * after(jnp.maximum(step - warmup, 0))

    return schedule


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, *, seed: int = 0
) -> optax.GradientTransformation:
    """Clip by global norm, Adam or Adafactor, decoupled weight decay, learning rate.

    Adafactor's updates have a root mean square of at most 1 in each leaf, about the
    same as Adam's, so both can use the same learning rate.  `seed` is that of the
    stochastic rounding of bfloat16 parameters.
    """
    clip = (
        optax.clip_by_global_norm(config.max_grad_norm)
        if config.max_grad_norm
        else optax.identity()
    )
    match config.optimizer:
        case Optimizer.ADAMW:
            scale = optax.scale_by_adam(
                config.adam_b1,
                config.adam_b2,
                config.adam_eps,
                mu_dtype=config.adam_mu_dtype,
            )
        case Optimizer.ADAFACTOR:
            scale = optax.chain(
                optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
            )
    chain = optax.chain(
        clip,
        scale,
        optax.add_decayed_weights(config.weight_decay, mask=_is_matrix),
        optax.scale_by_learning_rate(schedule),
    )
    return rounded_stochastically(chain, seed=seed)


def with_new_schedule(opt_state: optax.OptState) -> optax.OptState:
    """The optimizer's state of an earlier run, with learning rates from step 0 on."""
    is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)
    begun = lambda x: x._replace(count=0 * x.count) if is_schedule(x) else x
    return jax.tree.map(begun, opt_state, is_leaf=is_schedule)


def _is_matrix(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "norm" not in jax.tree_util.keystr(path), params
    )
