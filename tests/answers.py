"""Records of labeled answers and of lists, and numbers for their objectives."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from tests.tiny import WORDS


def words(rng, low=3, high=9):
    """A few random words."""
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


def labeled_records(count=48, seed=0):
    """Answers with a label, some of them to the same prompt."""
    rng = np.random.default_rng(seed)
    prompts = [words(rng, 2, 6) for _ in range(count * 2 // 3)]
    return [
        {
            "prompt": prompts[n % len(prompts)],
            "completion": " " + words(rng),
            "label": bool(rng.random() < 0.5),
        }
        for n in range(count)
    ]


def list_records(count=48, seed=0, most=4):
    """Two to `most` answers each, with distinct scores."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        size = int(rng.integers(2, most + 1))
        scores = rng.permutation(10)[:size] / 10
        answers = [" " + words(rng) for _ in range(size)]
        row = {"prompt": words(rng, 2, 6), "completions": answers}
        found.append(row | {"scores": scores.tolist()})
    return found


def voted_records(count=32, seed=0, most=4):
    """Pairs with one to `most` votes of named annotators, some of them ties."""
    rng = np.random.default_rng(seed)
    return [
        {
            "title": words(rng, 2, 6),
            "stance": words(rng, 1, 3),
            "a1": words(rng),
            "a2": words(rng),
            "votes": [
                {"worker": f"w{w}", "label": str(rng.choice(["a1", "a2", "equal"]))}
                for w in rng.permutation(5)[: rng.integers(1, most + 1)]
            ],
        }
        for _ in range(count)
    ]


def write_records(path, records):
    """A file of JSON Lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def one_weight(objective, logps, reference, labels, *, accumulation=1, state=None):
    """A step of an objective on given numbers, for a "model" of one weight w = 1.

    Args:
      objective: the objective.
      logps: the policy's log-probabilities at w = 1, [N, K]; they are w times these.
      reference: those of the reference, [N, K].
      labels: by name, [N] or [N, K].
      accumulation: micro-batches.
      state: the objective's state (default: the initial one).

    Returns:
      The gradient in w, the next state, and the metrics.
    """
    from jaxpref.data.batch import PreferenceBatch
    from jaxpref.scoring.scores import Scored
    from jaxpref.train.gradient import gradient

    count, sides = logps.shape
    shape = (accumulation, count // accumulation, 1)
    shaped = lambda x: jnp.asarray(np.reshape(x, (*shape, *np.shape(x)[1:])))
    numbers = np.float32
    batch = PreferenceBatch(
        tokens=jnp.zeros((*shape, 0), jnp.int32),
        lengths=jnp.zeros(shape, jnp.int32),
        predictors=jnp.zeros((*shape, 0), jnp.int32),
        targets=jnp.zeros((*shape, 0), jnp.int32),
        completions=jnp.zeros((*shape, 0), jnp.int32),
        pair_index=shaped(np.arange(count)),
        # An answer that is not there has neither tokens nor a log-probability.
        completion_lengths=shaped((logps != 0).astype(np.int32)),
        reference={"reference_logps": shaped(reference.astype(numbers))},
        is_flipped=jnp.zeros(shape, bool),
        annotator=jnp.full(shape, -1),
        empty_trace=jnp.zeros(shape, bool),
        weights=jnp.ones(shape, jnp.float32),
        numbers={name: shaped(np.asarray(x, numbers)) for name, x in labels.items()},
    )
    table = jnp.asarray(logps, jnp.float32)[:, None]
    score = lambda w, micro: Scored(
        {"policy_logps": w * table[micro.pair_index[:, 0]]}, {}
    )
    state = objective.init(0) if state is None else state
    step = jax.jit(lambda w: gradient(objective, score, w, batch, state))
    return step(jnp.float32(1.0))
