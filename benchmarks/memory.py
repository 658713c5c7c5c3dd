r"""What a train step needs beside its state: our LM head against logits everywhere.

Compiles the step that training runs (DPO, AdamW), from shapes alone, and prints the
compiler's temporaries (`memory_analysis().temp_size_in_bytes`, gradients among them)
for four heads on the same backbone:

- ours: on completion tokens only, a chunk at a time;
- log_softmax: logits [B, T, V] of all positions, then their log_softmax, as reference
  code does;
- logsumexp: the thriftiest way to have all logits, z[y] - logsumexp(z);
- none: no head at all, to see what the backbone and attention take.

Commands
    All sizes, and a Qwen-like 0.6B model (about 15 seconds a line on a quiet machine):

        python -m benchmarks.memory --json memory.json
        python -m benchmarks.memory --remat none
        python -m benchmarks.memory --model qwen-600m --vocabularies 152064

    Some of the sizes, in a minute:

        python -m benchmarks.memory --quick

Expected
    With jax 0.10.2 on a CPU, vocabulary 152,064, ours / log_softmax (/ logsumexp):
    padded at 512, 1024, 2048, 4096 tokens 0.24 (0.33), 0.17 (0.24), 0.21 (0.31), 0.37
    (0.54); packed at 512 and 1024 tokens 0.63 (0.95) and 0.32 (0.55).  Above a third it
    is what no head decides: at 4,096 the backbone with its dense attention takes 20.0
    of our 20.7 GiB, and in the small packed batch our head adds nothing to its 1.5 GiB,
    which is the size of four copies of the parameters.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.random_steps import (
    QWEN_600M,
    SMOLLM_135M,
    make_step,
    packed_batch,
    padded_batch,
    random_pairs,
)
from jaxpref import data, losses
from jaxpref.errors import InputError
from jaxpref.files import write_json
from jaxpref.models import Model, build
from jaxpref.train.entry import entry_point
from jaxpref.train.scores import ScoreFunction, make_scores, packed_mask

MODELS = {
    "smollm-135m-4-layers": dataclasses.replace(SMOLLM_135M, num_layers=4),
    "qwen-600m": QWEN_600M,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What is compiled."""

    model: Literal["smollm-135m-4-layers", "qwen-600m"] = "smollm-135m-4-layers"
    """Sizes; the vocabulary is replaced."""
    vocabularies: tuple[int, ...] = (32000, 49152, 128256, 152064)
    """Sizes of the vocabulary."""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Tokens of a sequence, or of a packed row."""
    layouts: tuple[Literal["padded", "packed"], ...] = ("padded", "packed")
    """One pair a row, each answer with its prompt; or two pairs a row, prompts once."""
    pairs: int = 4
    """Pairs of a batch; a quarter of every sequence is its prompt."""
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass computes again."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix products."""
    json: str | None = None
    """File for the records."""
    quick: bool = False
    """The smallest and largest vocabulary, up to 1,024 tokens."""

    def __post_init__(self):
        if min(self.lengths) < 32 or self.pairs < 1 or min(self.vocabularies) < 8:
            raise InputError(
                f"lengths {self.lengths}, pairs {self.pairs}, vocabularies "
                f"{self.vocabularies}: give at least 32 tokens, 1 pair, 8 entries"
            )


def random_batch(config: MemoryConfig, layout: str, length: int, vocab_size: int):
    """A batch that fills its rows but for a few tokens."""
    sizes = np.array([1, 3, 3])
    whole = length // 4 if layout == "padded" else length // 2 // sizes.sum()
    pairs = random_pairs(
        np.tile(whole * sizes, (config.pairs, 1)), vocab_size=vocab_size
    )
    if layout == "padded":
        return padded_batch(pairs)
    return packed_batch(pairs, row_length=length)


# ---- the heads ---------------------------------------------------------------------


def log_softmax_head(model: Model, params, hidden, predictors, targets) -> jax.Array:
    """Log-probs [B, P] out of a [B, T, V] table of them."""
    table = jax.nn.log_softmax(_logits(model, params, hidden))
    return jax.vmap(lambda row, p, t: row[p, t])(table, predictors, targets)


def logsumexp_head(model: Model, params, hidden, predictors, targets) -> jax.Array:
    """The same without a table beside the logits."""
    logits = _logits(model, params, hidden)
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jax.vmap(lambda row, p, t: row[p, t])(logits, predictors, targets)
    return chosen - jax.vmap(lambda row, p: row[p])(total, predictors)


def no_head(model: Model, params, hidden, predictors, targets) -> jax.Array:
    """Something of every hidden state, [B, P], that costs nothing."""
    sums = jnp.sum(hidden, axis=-1, dtype=jnp.float32)
    return jax.vmap(lambda row, p: row[p])(sums, predictors)


def _logits(model: Model, params, hidden) -> jax.Array:
    head = model.head(params).astype(hidden.dtype)
    return jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)


def scores_with(head: Callable, model: Model) -> ScoreFunction:
    """Scores as those of `make_scores`, through another head; without a mesh."""

    def scores(params, batch: data.PreferenceBatch, reference=None):
        rows, sequences, _ = batch.tokens.shape
        _, slots, sides = batch.completion_lengths.shape
        flat = lambda x: x.reshape(rows * sequences, *x.shape[2:])
        layout = ()
        if batch.segments is not None:
            layout = flat(batch.positions), packed_mask(flat(batch.segments))
        hidden = model.hidden(params, flat(batch.tokens), *layout)
        logps = head(model, params, hidden, flat(batch.predictors), flat(batch.targets))
        sums = losses.sum_by_completion(
            logps.reshape(batch.targets.shape),
            batch.completions,
            num_completions=slots * sides,
        )
        return {"policy_logps": sums.reshape(rows, slots, sides)}

    return scores


HEADS = {
    "ours": make_scores,
    "log_softmax": lambda model: scores_with(log_softmax_head, model),
    "logsumexp": lambda model: scores_with(logsumexp_head, model),
    "none": lambda model: scores_with(no_head, model),
}


# ---- the measurement ---------------------------------------------------------------


def temporaries(model: Model, scores: ScoreFunction, batch) -> int:
    """Bytes of a compiled step's temporaries; nothing is run, and no weight made."""
    step, new_state = make_step(model, scores)
    state = jax.eval_shape(lambda key: new_state(model.init(key)), jax.random.key(0))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    compiled = step.lower(state, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def measure(config: MemoryConfig, layout: str, vocab_size: int, length: int) -> dict:
    """One record: MiB by head."""
    model = build(
        dataclasses.replace(
            MODELS[config.model],
            vocab_size=vocab_size,
            remat=config.remat,
            compute_dtype=config.compute_dtype,
        )
    )
    batch = random_batch(config, layout, length, vocab_size)
    started = time.perf_counter()
    found = {
        name: temporaries(model, make(model), batch) / 2**20
        for name, make in HEADS.items()
    }
    return {
        "layout": layout,
        "vocabulary": vocab_size,
        "length": length,
        "rows": int(np.prod(batch.tokens.shape[:3])),
        "predicted": int(np.prod(batch.targets.shape)),
        "mib": found,
        "ratio": found["ours"] / found["log_softmax"],
        "seconds": time.perf_counter() - started,
    }


def main(config: MemoryConfig) -> None:
    """The table, row by row."""
    vocabularies, lengths = config.vocabularies, config.lengths
    if config.quick:
        vocabularies = tuple(dict.fromkeys((min(vocabularies), max(vocabularies))))
        lengths = tuple(n for n in lengths if n <= 1024) or (min(lengths),)
    print(
        f"{config.model}, {config.pairs} pairs, remat {config.remat}, "
        f"{config.compute_dtype}; temporaries of the compiled step in MiB "
        f"({jax.default_backend()}, jax {jax.__version__})"
    )
    columns = (
        "layout",
        "vocabulary",
        "length",
        *HEADS,
        "ours/log_softmax",
        "/logsumexp",
    )
    print(("{:>8}{:>12}{:>8}" + "{:>13}" * 4 + "{:>18}{:>12}").format(*columns))
    records = []
    for layout in config.layouts:
        for vocab_size in vocabularies:
            for length in lengths:
                record = measure(config, layout, vocab_size, length)
                records.append(record)
                mib = record["mib"]
                ratios = [mib["ours"] / mib[k] for k in ("log_softmax", "logsumexp")]
                print(
                    f"{layout:>8}{vocab_size:>12}{length:>8}"
                    + "".join(f"{mib[name]:>13.0f}" for name in HEADS)
                    + "{:>18.2f}{:>12.2f}".format(*ratios),
                    flush=True,
                )
    largest = max(vocabularies)
    ratios = np.array([r["ratio"] for r in records if r["vocabulary"] == largest])
    print(
        f"vocabulary {largest}: {ratios.min():.2f} to {ratios.max():.2f} of the step "
        f"with log_softmax; at most a third in {np.mean(ratios <= 1 / 3):.0%} of cases"
    )
    if config.json is not None:
        setting = dataclasses.asdict(config) | {
            "backend": jax.default_backend(),
            "jax": jax.__version__,
        }
        write_json(config.json, {"config": setting, "records": records})


if __name__ == "__main__":
    with entry_point():
        main(tyro.cli(MemoryConfig, description=__doc__))
