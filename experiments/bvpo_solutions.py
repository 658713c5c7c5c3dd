"""Gradient variance over real reasoning traces: several solutions of one question.

Right and wrong solutions of GSM8K test questions by four models (Cobbe et al. 2021,
arXiv:2110.14168).  The steps are the trace, and the number after "A:" is the answer.
Right solutions of a question are treated as resampled traces of one answer.  The
questions are from the TEST set: never evaluate a model trained on them on GSM8K test.
Here only gradients are measured.
"""

import functools
import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.reasoning_errors import GRID, mixture_variance
from experiments.sentiment_world import write_jsonl
from jaxpref import losses
from jaxpref.data import (
    DataOptions,
    MixOptions,
    PreferenceDataset,
    load_tokenizer,
    make_mixed_splits,
    open_source,
)
from jaxpref.errors import InputError
from jaxpref.gradients import bvpo as mixing
from jaxpref.models import build, token_logps
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.hub import resolve_folder
from jaxpref.objectives import bvpo, from_loss
from jaxpref.objectives.trace_mixture import AUTO
from jaxpref.train import OptimizerConfig, TrainConfig, read_metrics, run

SKETCH = 512
"""Size of gradient sketches; squared norms are within 6%."""
REDRAWS = 400
LONGEST = 512


def read_records(path: str | Path, count: int) -> list[dict]:
    """The first `count` questions with two or more right solutions, as pairs.

    The rejected side is the first wrong solution and those with the same answer.
    """
    questions: dict[int, dict] = {}
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            question = questions.setdefault(
                row["idx"], {"prompt": row["prompt"], "chosen": {}, "rejected": {}}
            )
            for side in ("chosen", "rejected"):
                trace, mark, answer = row[side].rpartition("\nA:")
                if not mark:
                    raise InputError(f"{path} row {number}: {side!r} has no line 'A:'")
                traces = question[side].setdefault(answer.strip(), [])
                if trace not in traces:
                    traces.append(trace)
    records = []
    for question in questions.values():
        sides = {}
        for side in ("chosen", "rejected"):
            answer, traces = next(iter(question[side].items()))
            sides[side] = {"trace": traces, "answer": answer}
        if len(sides["chosen"]["trace"]) > 1:
            records.append({"prompt": question["prompt"] + "\n", **sides})
    if len(records) < count:
        raise InputError(
            f"{path}: {len(records)} questions have two right solutions; ask for fewer"
        )
    return records[:count]


def measure(
    path: str, model_name: str, out: Path, *, questions: int, steps: int, beta: float
) -> dict:
    """Trains on the solutions with alpha "auto"; gradient variances before and after.

    Args:
      path: the file of the solutions.
      model_name: model folder or Hub ID.
      out: the run's folder.
      questions: number of questions.
      steps: training steps.
      beta: DPO's beta.

    Returns:
      `places`, for "before" and "after": the `variance` of the mixture over resampled
      traces for each alpha of `GRID`, and `jaxpref.gradients.bvpo.ingredients` of these
      gradients; `alphas` of the run by step; `questions`, `traces`, `cut`.
    """
    folder = resolve_folder(model_name)
    out.mkdir(parents=True, exist_ok=True)
    records = read_records(path, questions)
    write_jsonl(out / "pairs.jsonl", records)
    tokenizer, model = load_tokenizer(folder), build(read_architecture(folder))
    length = min(LONGEST, model.architecture.max_position_embeddings)
    options = DataOptions(max_length=length, heldout_fraction=0.0)
    plan = make_mixed_splits(open_source(str(out / "pairs.jsonl")), tokenizer, options)
    export = run(
        TrainConfig(
            model=str(folder),
            data=str(out / "pairs.jsonl"),
            out=str(out / "run"),
            objective=bvpo(from_loss(losses.dpo, beta=beta), alpha=AUTO),
            mix=MixOptions(),
            max_steps=steps,
            batch_size=8,
            log_every=max(steps // 16, 1),
            save_every=steps,
            options=options,
            optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=steps // 10),
        )
    )
    base = load_params(folder, model)
    references = _logps(model, base, plan.train)
    places = {
        "before": variances(model, base, plan.train, references, beta=beta),
        "after": variances(
            model, load_params(export, model), plan.train, references, beta=beta
        ),
    }
    lines = read_metrics(out / "run" / "metrics.jsonl")
    shown = ("step", "bvpo/alpha", "bvpo/trace_variance", "bvpo/bias_sq")
    traces = sum(len(r["chosen"]["trace"]) for r in records)
    return {
        "model": Path(model_name).name,
        "questions": questions,
        "traces": traces,
        "cut": plan.report.get("traces cut", 0),
        "places": places,
        "run": [{k: x[k] for k in shown} for x in lines if "bvpo/alpha" in x],
    }


def variances(
    model, params, pairs: PreferenceDataset, references, *, beta: float
) -> dict:
    """Gradient variance of a batch of all questions, with one resampled trace each."""
    rows = pairs.columns["row"][~pairs.columns["empty_trace"]]
    sketches = np.stack(
        [
            np.asarray(_sketch(model, params, *row, base, beta=beta))
            for row, base in zip(_rows(pairs), references)
        ]
    )
    trace, empty = (
        sketches[~pairs.columns["empty_trace"]],
        sketches[pairs.columns["empty_trace"]],
    )
    g_e = empty.mean(axis=0)
    owned = [np.flatnonzero(rows == row) for row in np.unique(rows)]
    rng = np.random.default_rng(0)
    picked = np.stack([rng.choice(own, REDRAWS) for own in owned])
    drawn = trace[picked].mean(axis=0)
    found = mixing.ingredients(drawn, g_e[None])
    return {
        "variance": [mixture_variance(drawn, g_e, alpha) for alpha in GRID],
        "trace_norm_sq": float(np.sum(drawn.mean(axis=0) ** 2)),
        "empty_norm_sq": float(np.sum(g_e**2)),
        "bias_sq": float(found.empty_bias_sq),
        "best_alpha": float(mixing.optimal_alpha(**vars(found))),
    }


# ---- one pair at a time ------------------------------------------------------------


def _rows(pairs: PreferenceDataset):
    """Tokens [2, T], prompt length, and total lengths [2] of every pair."""
    width = -(-pairs.longest // 64) * 64
    for n in range(len(pairs)):
        tokens = np.zeros((2, width), np.int32)
        prompt = pairs.prompt(n)
        sides = [np.concatenate([prompt, pairs.completion(n, k)]) for k in (0, 1)]
        for row, side in zip(tokens, sides):
            row[: len(side)] = side
        yield tokens, len(prompt), np.array(list(map(len, sides)))


def _logps(model, params, pairs: PreferenceDataset) -> np.ndarray:
    """Log-probs of both completions of every pair, [N, 2]."""
    return np.stack([np.asarray(_of_pair(model, params, *row)) for row in _rows(pairs)])


@functools.partial(jax.jit, static_argnums=0)
def _of_pair(model, params, tokens, prompt, lengths):
    hidden, head = model.hidden(params, tokens), model.head(params)
    before = jnp.broadcast_to(jnp.arange(tokens.shape[1] - 1), tokens[:, 1:].shape)
    logps = token_logps(hidden, head, before, tokens[:, 1:], chunk_size=64)
    inside = (before + 1 >= prompt) & (before + 1 < lengths[:, None])
    return jnp.sum(jnp.where(inside, logps, 0), axis=1)


@functools.partial(jax.jit, static_argnums=0, static_argnames="beta")
def _sketch(model, params, tokens, prompt, lengths, base, *, beta):
    """A sketch of the gradient of DPO's loss of one pair."""

    def loss(params):
        return losses.dpo(
            *_of_pair(model, params, tokens, prompt, lengths), *base, beta=beta
        )

    gradient = jax.grad(loss)(params)
    return mixing.sketch(gradient, jax.random.key(0), size=SKETCH)
