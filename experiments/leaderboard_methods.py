"""The methods of `leaderboard.py`, from the library's own lists, and how they train."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.leaderboard_world import Noise, Pairs, World
from experiments.log_linear import all_logits, log_policy, measure, one_pass
from jaxpref import losses, objectives
from jaxpref.data import PreferenceBatch
from jaxpref.data.columns import ARRAYS
from jaxpref.objectives import Inputs, Objective, from_loss, trainable
from jaxpref.scoring.scores import Scored

EXCEPTIONS = {
    "bvpo": "mixes pairs with and without reasoning traces; this world has no traces",
    "dove": "is DPO, unless the answers of a pair have different prompts",
    "align_distil": "distills two models that were trained before",
    "sparse_po": "reads the layers of a transformer; this world's policies have none",
    "spo": "reads how much content answers have lost",
    "rationale": "reads rationales, which this world's pairs do not have",
    "general_preference": "reads embeddings; this world's policies give numbers",
    "attribute_regression": "reads ratings of several attributes",
    "goal_contrast": "reads hidden states; this world's policies have none",
    "more": "weights several files of a reward model's data; this world has one",
    "center_rewards": "a penalty, which is added to a loss of reward models",
    **dict.fromkeys(("apo_zero_unpaired", "bco", "kto"), "reads labeled answers"),
    **dict.fromkeys(("irpo", "lipo_lambda", "plackett_luce"), "reads lists of answers"),
}
"""Public functions of pairs that are not in the table, with the reason."""

FULL = (
    *("dpo", "ipo", "simpo", "cdpo", "rdpo", "forward_dpo"),
    *("ropo", "dr_dpo", "holder_dpo", "em", "instance_noise", "known_rates"),
)
"""Methods that are reported with all seeds; the others with two."""
COSTLY = ("instance_noise", "tdpo1", "tdpo2", "wpo", "auto", "learned_rate")
"""Methods whose steps take many times as long: every second beta, and the middle one of
the learning rates."""

SETTINGS: dict[str, Callable[..., dict[str, Any]]] = {
    "alpha_dpo": lambda beta: {"beta": beta, "alpha": 0.5},
    "chi_po": lambda beta: {"beta": beta, "max_reward": 8.0},
    "flex_dpo": lambda beta: {"chosen_beta": beta, "rejected_beta": beta / 2},
    "gamma_po": lambda beta: {"beta": beta, "gamma": 0.5},
    "r_dpo": lambda beta: {"beta": beta, "alpha": 0.05},
}
"""Options of losses that have no default for them.  (No review is better than another
by more than 8 points.)"""
TOLD = {
    "flip_rate": "the flip rate of each pair",
    "margin": "the gold rewards",
    "strength": "the gold rewards",
    "chosen_rating": "the gold rewards",
}
"""What a method knows that reads one of these labels."""
MEAN_RATE = "the mean flip rate"
RAMP_STEPS = 32.0
"""The option `ramp_steps` of crm: a quarter of the pass."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A loss or an objective; objectives wrap DPO."""

    name: str
    make: Callable[[Any, float], Objective]
    """`make(beta, mean flip rate)`."""
    has_beta: bool
    knows: str
    """What it knows in addition to the pairs and their annotators; may be empty."""

    @property
    def needs_rate(self) -> bool:
        """Whether it knows the mean flip rate."""
        return self.knows == MEAN_RATE

    @property
    def learns(self) -> bool:
        """Whether its objective has a state, which may depend on the annotators."""
        return bool(jax.tree.leaves(self.make(0.1, 0.1).init(1)))

    @functools.cached_property
    def reads_margins(self) -> bool:
        """Whether its losses depend on the policy only by the margins of the pairs.

        They then do not change if the log-probabilities of both answers of a pair
        change by the same number, which is tried on random pairs.  Such methods need
        no normalizer Z(x), the costliest part of a step.
        """
        objective = self.make(0.1, 0.1)
        if not objective.scores <= {"policy_logps", "reference_logps", "lengths"}:
            return False
        rng = np.random.default_rng(0)
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
        lengths = jnp.asarray(rng.integers(1, 9, (1, 64, 1, 2)), jnp.int32)
        batch = dataclasses.replace(blank_batch(64), completion_lengths=lengths)
        state = objective.init(1)
        policy, reference, shift = (
            draw(1, 64, 1, 2),
            draw(1, 64, 1, 2),
            draw(1, 64, 1, 1),
        )

        def values(policy):
            scores = {"policy_logps": policy, "reference_logps": reference}
            models = {"one": scores, "two": scores}
            inputs = Inputs(models if objective.num_models == 2 else scores, batch)
            return objective.losses(inputs, state)

        change = jnp.abs(values(20 * policy) - values(20 * policy + 20 * shift))
        return bool(jnp.max(change) < 1e-3)

    @property
    def trains_rewards(self) -> bool:
        """Whether it trains a reward model r.

        The policy is then the optimum for its rewards, ref(y|x) exp(r(x, y) / beta).
        """
        return "rewards" in self.make(0.1, 0.1).scores


def all_methods() -> dict[str, Method]:
    """Every loss and objective that can be trained on this world's pairs, by name."""
    factories = {make.__name__: make for make in objectives.FACTORIES}
    names = {name for name in losses.__all__ if trainable(getattr(losses, name))}
    made = [
        *(of_loss(getattr(losses, name)) for name in names - factories.keys()),
        *(of_factory(f) for name, f in factories.items() if name not in EXCEPTIONS),
        *(
            of_wrapper(wrap)
            for wrap in objectives.WRAPPERS
            if wrap.__name__ not in EXCEPTIONS
        ),
        of_known_rates(),
    ]
    kept = [method for method in made if method.name not in EXCEPTIONS]
    return {method.name: method for method in sorted(kept, key=lambda m: m.name)}


def of_loss(loss: Callable) -> Method:
    """The mean of a loss over the pairs."""
    name, options = loss.__name__, inspect.signature(loss).parameters
    given = SETTINGS.get(name, lambda beta: {"beta": beta} if "beta" in options else {})
    rate = lambda flip_rate: {"flip_rate": flip_rate} if "flip_rate" in options else {}
    return described(
        name,
        lambda beta, flip_rate: from_loss(loss, **given(beta), **rate(flip_rate)),
        has_beta=bool(given(1.0)),
        knows=MEAN_RATE if "flip_rate" in options else "",
    )


def of_factory(make: Callable) -> Method:
    """An objective that is no mean of a loss."""
    has_beta = "beta" in inspect.signature(make).parameters
    build = lambda beta, rate: make(beta=beta) if has_beta else make()
    return described(make.__name__, build, has_beta=has_beta, knows="")


def of_wrapper(wrap: Callable) -> Method:
    """An objective around DPO."""
    knows = "noise_rate" in inspect.signature(wrap).parameters
    more = lambda rate: {"noise_rate": rate, "ramp_steps": RAMP_STEPS} if knows else {}
    return described(
        wrap.__name__,
        lambda beta, rate: wrap(functools.partial(losses.dpo, beta=beta), **more(rate)),
        has_beta=True,
        knows=MEAN_RATE if knows else "",
    )


def of_known_rates() -> Method:
    """DPO with the forward correction for the flip rate of each pair."""
    corrected = lambda beta: objectives.forward(
        functools.partial(losses.dpo, beta=beta), flip_rate=objectives.PER_RECORD
    )
    make = lambda beta, rate: from_loss(corrected(beta))
    return described("known_rates", make, has_beta=True, knows="")


def described(name: str, make: Callable, *, has_beta: bool, knows: str) -> Method:
    """The method, with what its objective knows from the labels it reads."""
    found = {TOLD[label] for label in make(0.1, 0.1).numbers & TOLD.keys()}
    return Method(name, make, has_beta, knows or ", ".join(sorted(found)))


@dataclasses.dataclass(frozen=True)
class Grid:
    """Settings of a sweep: the beta and the learning rate of each run."""

    betas: np.ndarray
    """NaN for a method without one."""
    learning_rates: np.ndarray


def make_grid(method: Method, betas, learning_rates) -> Grid:
    """Every beta with every learning rate.

    A method that has neither a beta nor rewards to scale is swept over as many learning
    rates as there are betas, halved again and again from the largest.
    """
    if not (method.has_beta or method.trains_rewards):
        halved = max(learning_rates) * 0.5 ** np.arange(len(betas))
        return Grid(np.full(len(betas), np.nan), halved)
    if method.name in COSTLY:
        middle = len(learning_rates) // 2
        betas, learning_rates = betas[::2], learning_rates[middle : middle + 1]
    pairs = [(beta, rate) for rate in learning_rates for beta in betas]
    return Grid(*np.array(pairs).T)


# ---- scores: what a log-linear policy says of a batch --------------------------------


def node_probabilities(world: World, logps) -> jax.Array:
    """Probability of each prefix of an answer, [nodes]; 1 for roots."""
    each = jnp.broadcast_to(jnp.exp(logps.ravel())[:, None], world.paths.shape)
    found = jnp.zeros(len(world.parents), logps.dtype).at[world.paths].add(each)
    roots = world.parents == np.arange(len(world.parents))
    return jnp.where(roots, 1.0, found)


def score(
    theta,
    batch: PreferenceBatch,
    *,
    world: World,
    reads: frozenset[str],
    normalized: bool = True,
):
    """The scores that an objective reads, [R, S, K], as `jaxpref.scoring` names them.

    A completion is one "token", the index of its answer.  Without normalization, the
    policy's log-probabilities lack a term that the answers of a pair share, log Z(x).
    """
    answers = batch.tokens[..., 0]
    per_pair = lambda values: values[:, None, :]
    logits = jnp.asarray(world.features, theta.dtype)[answers] @ theta
    if "rewards" in reads:
        return {"rewards": per_pair(logits)}
    reviews = world.rewards.shape[1]
    uniform = per_pair(jnp.full_like(logits, -np.log(reviews)))
    if not normalized:
        return {"policy_logps": per_pair(logits), "reference_logps": uniform}
    normalizer = jax.nn.logsumexp(all_logits(world, theta), axis=1)
    logps = per_pair(logits - normalizer[answers // reviews])
    scores = {"policy_logps": logps, "reference_logps": uniform}
    if reads <= scores.keys() | {"lengths"}:
        return scores
    base = jnp.full(world.rewards.shape, -np.log(reviews), theta.dtype)
    policies = {"policy": log_policy(world, theta), "reference": base}
    nodes = {name: node_probabilities(world, p) for name, p in policies.items()}
    shorter = jnp.min(batch.completion_lengths[:, 0], axis=-1, keepdims=True)
    last = jnp.asarray(world.paths)[answers, shorter - 1]
    for name, probabilities in nodes.items():
        prefix = per_pair(jnp.log(probabilities[last]))
        scores[f"{name}_prefix_logps"] = prefix
    kls, log_weights = token_statistics(world, nodes, jnp.asarray(world.paths)[answers])
    return scores | {"kls": per_pair(kls), "log_weights": per_pair(log_weights)}


def token_statistics(world: World, nodes, paths) -> tuple[jax.Array, jax.Array]:
    """(`kls`, `log_weights`) of answers, from the next-token distributions.

    Args:
      world: the world.
      nodes: probabilities of the prefixes under policy and reference, by name.
      paths: of the answers, [R, K, tokens].
    """
    parents, last = world.parents, len(world.parents) - 1
    real = parents != np.arange(len(parents))
    tiny = jnp.finfo(nodes["policy"].dtype).tiny
    log = lambda p: jnp.log(jnp.maximum(p, tiny))
    conditional = {
        name: jnp.where(real, log(p) - log(p[parents]), 0.0)
        for name, p in nodes.items()
    }
    policy, reference = conditional["policy"], conditional["reference"]
    total = lambda values: jnp.zeros_like(values).at[parents].add(values * real)
    kl = total(jnp.exp(reference) * (reference - policy))
    collisions = log(total(jnp.exp(2 * policy)))
    inside = paths != last
    at = jnp.asarray(parents)[paths]
    kls = jnp.sum(jnp.where(inside, kl[at], 0), axis=-1)
    each = jnp.where(inside, policy[paths] - collisions[at], 0)
    return kls, jnp.sum(each, axis=-1) / jnp.sum(inside, axis=-1)


# ---- training and measuring ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a training run: one pass over the pairs."""

    pairs: int
    batch: int

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.pairs // self.batch


def stacked(draws: list[Pairs], sizes: Sizes) -> dict[str, Any]:
    """The pairs of several seeds, [seeds, steps, batch, ...], by name."""
    split = lambda *arrays: np.stack(arrays).reshape(
        len(draws), sizes.steps, sizes.batch, *arrays[0].shape[1:]
    )
    return jax.tree.map(split, *(vars(pairs) for pairs in draws))


def make_batch(world: World, pairs: dict[str, Any], step) -> PreferenceBatch:
    """The batch of one step, with A = 1 micro-batch and S = 1 pair per row."""
    answers = pairs["answers"]
    column = lambda values: jnp.asarray(values).reshape(1, len(answers), 1)
    lengths = jnp.asarray(world.lengths, jnp.int32)[answers]
    return dataclasses.replace(
        blank_batch(len(answers)),
        tokens=answers[None, :, :, None],
        pair_index=column(step * len(answers) + jnp.arange(len(answers))),
        completion_lengths=lengths[None, :, None],
        is_flipped=column(pairs["is_flipped"]),
        annotator=column(pairs["annotator"]),
        numbers={
            name: column(jnp.asarray(values, jnp.float32))
            for name, values in pairs["labels"].items()
        },
    )


def blank_batch(count: int) -> PreferenceBatch:
    """A batch of pairs without labels and annotators, whose answers have one token."""
    shape = (1, count, 1)
    empty = jnp.zeros((1, count, 2, 0), jnp.int32)
    return PreferenceBatch(
        tokens=jnp.zeros((1, count, 2, 1), jnp.int32),
        lengths=jnp.ones((1, count, 2), jnp.int32),
        predictors=empty,
        targets=empty,
        completions=empty,
        pair_index=jnp.arange(count, dtype=jnp.int32).reshape(shape),
        completion_lengths=jnp.ones((*shape, 2), jnp.int32),
        reference={},
        is_flipped=jnp.zeros(shape, bool),
        annotator=jnp.full(shape, -1, jnp.int32),
        empty_trace=jnp.zeros(shape, bool),
        weights=jnp.ones(shape, jnp.float32),
        numbers=dict.fromkeys(
            (*ARRAYS, "flip_rate"), jnp.full(shape, 0.5, jnp.float32)
        ),
    )


def train_one(
    world: World,
    method: Method,
    noise: Noise,
    normalized: bool,
    pairs: dict[str, Any],
    beta,
    learning_rate,
) -> dict[str, jax.Array]:
    """One training run from theta = 0: {"reward", "kl"} of its last policy."""
    objective = method.make(beta, noise.flip_rate)
    of_theta = functools.partial(
        score,
        world=world,
        reads=objective.scores,
        normalized=normalized,
    )

    def scores(params, batch):
        found = [of_theta(theta, batch) for theta in params]
        if len(found) == 1:
            return Scored(found[0], {})
        return Scored(dict(zip(("one", "two"), found)), {"one": {}, "two": {}})

    params = one_pass(
        objective,
        scores,
        functools.partial(make_batch, world),
        pairs,
        start=[jnp.zeros(world.features.shape[1])] * objective.num_models,
        annotators=noise.annotators,
        learning_rate=learning_rate,
    )
    scale = 1 / beta if method.trains_rewards else 1.0
    return measure(world, scale * params[0])


def trainer(world: World, method: Method, noise: Noise) -> Callable:
    """`train(pairs, betas, learning rates) -> {"reward", "kl"}`, [seeds, settings]."""
    # Found out here, because nothing can be tried while tracing.
    normalized = not method.reads_margins
    one = functools.partial(train_one, world, method, noise, normalized)
    return jax.jit(jax.vmap(jax.vmap(one, (None, 0, 0)), (0, None, None)))
