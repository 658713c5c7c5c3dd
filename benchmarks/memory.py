r"""Temporary memory of a train step, compared with steps that compute all logits.

Compiles the training step (DPO, AdamW) from shapes alone, and prints the compiler's
temporaries (`memory_analysis().temp_size_in_bytes`, including gradients).  The same
pairs are processed by

- ours: packed rows, with the head on completion tokens only, one chunk at a time;
- peers: one sequence per answer with its prompt, logits [B, T, V] of all positions, and
  their log_softmax.  `thrifty` peers use z[y] - logsumexp(z) instead, the least memory
  with all logits, like Tunix 0.1.7 (TRL 1.16 computes tiles of logits and is neither).
  Attention is our blockwise attention, so it does not contribute to the difference;

and, for the packed rows, by other heads on the same backbone:

- log_softmax, logsumexp: those of the peers;
- none: no head, to measure the backbone.

Commands
    All sizes, and a 0.6B model with a large vocabulary:

        python -m benchmarks.memory --json memory.json
        python -m benchmarks.memory --model llama-0.6b-152k --vocabularies 151936

    One vocabulary, up to 1,024 tokens; the layout without packing:

        python -m benchmarks.memory --quick
        python -m benchmarks.memory --quick --layouts padded

    It only compiles: 80 to 170 seconds per line on two busy cores.

Expected
    MiB for four pairs, `--vocabularies 152064`, float32, jax 0.10.2 on a CPU (x86):

        tokens    peers  thrifty   ours  ours / peers  / thrifty
           512    8,256    6,214  2,632          0.32       0.42
         1,024   16,336   11,918  3,480          0.21       0.29
         2,048   32,496   23,326  5,218          0.16       0.22
         4,096   64,816   46,142  8,631          0.13       0.19

    At 512 tokens, the transposed embedding and the gradient of the head (0.3 GiB each)
    are in memory together with the chunk's arrays, however few tokens there are.
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
    make_step,
    padded_batch,
    pair_a_row_batch,
    random_pairs,
)
from jaxpref import data, losses
from jaxpref.errors import InputError
from jaxpref.files import check_output, write_json
from jaxpref.models import Model, Numerics, build
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.objectives import from_loss
from jaxpref.plan.presets import PRESETS
from jaxpref.runtime.entry import entry_point
from jaxpref.scoring import make_scorer
from jaxpref.scoring.scores import Scored

MODELS = {
    "smollm-135m-4-layers": dataclasses.replace(PRESETS["smollm2-135m"], num_layers=4),
    "llama-0.6b-152k": PRESETS["llama-0.6b-152k"],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Options of this benchmark."""

    model: Literal["smollm-135m-4-layers", "llama-0.6b-152k"] = "smollm-135m-4-layers"
    """Preset of sizes; its vocabulary is replaced."""
    vocabularies: tuple[int, ...] = (49152, 152064)
    """Sizes of the vocabulary."""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Tokens of a prompt plus an answer; a quarter is the prompt."""
    layouts: tuple[Literal["packed", "padded"], ...] = ("packed",)
    """Our layouts: prompts once (packed) or per answer (padded); one pair per row."""
    pairs: int = 4
    """Pairs per batch."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix products."""
    json: str | None = None
    """JSON file for the results."""
    quick: bool = False
    """The largest vocabulary, up to 1,024 tokens."""

    def __post_init__(self):
        if min(self.lengths) < 32 or self.pairs < 1 or min(self.vocabularies) < 8:
            raise InputError(
                f"lengths {self.lengths}, pairs {self.pairs}, vocabularies "
                f"{self.vocabularies}: needs at least 32 tokens, 1 pair, 8 entries"
            )


def random_batches(config: MemoryConfig, length: int, vocab_size: int):
    """The same pairs in both layouts, without padding."""
    quarter = length // 4
    sizes = [quarter, length - quarter, length - quarter]
    pairs = random_pairs(np.tile(sizes, (config.pairs, 1)), vocab_size=vocab_size)
    return {"packed": pair_a_row_batch(pairs), "padded": padded_batch(pairs)}


# ---- the heads ---------------------------------------------------------------------


def log_softmax_head(model: Model, params, hidden, predictors, targets) -> jax.Array:
    """Log-probs [B, P] from an array [B, T, V] of log-probs."""
    table = jax.nn.log_softmax(_logits(model, params, hidden))
    return jax.vmap(lambda row, p, t: row[p, t])(table, predictors, targets)


def logsumexp_head(model: Model, params, hidden, predictors, targets) -> jax.Array:
    """The same as `log_softmax_head`, without an array of log-probs."""
    logits = _logits(model, params, hidden)
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jax.vmap(lambda row, p, t: row[p, t])(logits, predictors, targets)
    return chosen - jax.vmap(lambda row, p: row[p])(total, predictors)


def no_head(model: Model, params, hidden, predictors, targets) -> jax.Array:
    """A negligible function of every hidden state, [B, P]."""
    sums = jnp.sum(hidden, axis=-1, dtype=jnp.float32)
    return jax.vmap(lambda row, p: row[p])(sums, predictors)


def _logits(model: Model, params, hidden) -> jax.Array:
    head = model.head(params).astype(hidden.dtype)
    return jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)


def scorer_with(
    head: Callable, model: Model, *, blockwise: bool = False
) -> Callable[..., Scored]:
    """A function called like a `PolicyScorer`, with another head and without a mesh.

    With `blockwise`, each padded sequence is treated as a packed row of one prompt.
    """

    def score(
        params, frozen, batch: data.PreferenceBatch, *, totals=frozenset()
    ) -> Scored:
        del frozen
        rows, sequences, _ = batch.tokens.shape
        _, slots, sides = batch.completion_lengths.shape
        flat = lambda x: x.reshape(rows * sequences, *x.shape[2:])
        positions = segments = None
        if batch.segments is not None:
            positions, segments = flat(batch.positions), flat(batch.segments)
            segments = segments // batch.num_parts, segments % batch.num_parts
        elif blockwise:
            one = jnp.zeros_like(flat(batch.tokens))
            segments = one, one
        hidden = model.hidden(params, flat(batch.tokens), positions, segments)
        logps = head(model, params, hidden, flat(batch.predictors), flat(batch.targets))
        sums = losses.sum_by_completion(
            logps.reshape(batch.targets.shape),
            batch.completions,
            num_completions=slots * sides,
        )
        return Scored({"policy_logps": sums.reshape(rows, slots, sides)}, {})

    return score


HEADS = {
    "ours": lambda model: make_scorer(model, from_loss(losses.dpo).scores),
    "log_softmax": lambda model: scorer_with(log_softmax_head, model),
    "logsumexp": lambda model: scorer_with(logsumexp_head, model),
    "none": lambda model: scorer_with(no_head, model),
}
"""Heads for our rows."""
PEERS = {
    "peers": lambda model: scorer_with(log_softmax_head, model, blockwise=True),
    "thrifty": lambda model: scorer_with(logsumexp_head, model, blockwise=True),
}
"""Heads for the padded layout."""
AGAINST = (*PEERS, "log_softmax", "logsumexp")
"""Systems to compare with."""


# ---- the measurement ---------------------------------------------------------------


def temporaries(model: Model, scorer: Callable[..., Scored], batch) -> int:
    """Bytes of a compiled step's temporaries; nothing is run or allocated."""
    step, new_state = make_step(model, scorer)
    state = jax.eval_shape(lambda key: new_state(model.init(key)), jax.random.key(0))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    compiled = step.lower(state, {}, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def measure(
    config: MemoryConfig, sizes: LlamaArchitecture, layout: str, length: int
) -> dict:
    """One record: MiB by name, and ours relative to the others."""
    numerics = Numerics(remat=config.remat, compute_dtype=config.compute_dtype)
    model = build(sizes, numerics)
    batches = random_batches(config, length, sizes.vocab_size)
    started = time.perf_counter()
    found = {
        name: temporaries(model, make(model), batches[own])
        for heads, own in ((PEERS, "padded"), (HEADS, layout))
        for name, make in heads.items()
    }
    rows = {"ours": batches[layout], "peers": batches["padded"]}
    return {
        "layout": layout,
        "vocabulary": sizes.vocab_size,
        "length": length,
        "tokens": {name: int(b.tokens.size) for name, b in rows.items()},
        "mib": {name: size / 2**20 for name, size in found.items()},
        "ratios": {name: found["ours"] / found[name] for name in AGAINST},
        "seconds": time.perf_counter() - started,
    }


def main(config: MemoryConfig) -> None:
    """Prints the table."""
    if config.json is not None:
        check_output("--json", config.json, {})
    vocabularies, lengths = config.vocabularies, config.lengths
    if config.quick:
        vocabularies = (max(vocabularies),)
        lengths = tuple(n for n in lengths if n <= 1024) or (min(lengths),)
    print(
        f"{config.model}, {config.pairs} pairs, remat {config.remat}, "
        f"{config.compute_dtype}; temporaries of the compiled step in MiB "
        f"({jax.default_backend()}, jax {jax.__version__})"
    )
    names = (*PEERS, *HEADS)
    columns = ("layout", "vocabulary", "length", *names)
    heading = "{:>8}{:>11}{:>7}" + "{:>12}" * len(names)
    print(heading.format(*columns) + "  ours / " + ", / ".join(AGAINST))
    records = []
    for layout in config.layouts:
        for vocab_size in vocabularies:
            sizes = dataclasses.replace(MODELS[config.model], vocab_size=vocab_size)
            for length in lengths:
                record = measure(config, sizes, layout, length)
                records.append(record)
                mib = (f"{record['mib'][name]:.0f}" for name in names)
                ratios = ", ".join(f"{x:.2f}" for x in record["ratios"].values())
                line = heading.format(layout, vocab_size, length, *mib)
                print(f"{line}  {ratios}", flush=True)
    largest = max(vocabularies)
    ratios = [r["ratios"]["peers"] for r in records if r["vocabulary"] == largest]
    print(
        f"vocabulary {largest}: {min(ratios):.2f} to {max(ratios):.2f} of the peers' "
        f"step; at most a third in {np.mean(np.array(ratios) <= 1 / 3):.0%} of cases"
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
