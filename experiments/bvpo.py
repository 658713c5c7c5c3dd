"""Mixing noisy gradients with reasoning traces and biased gradients without traces.

Claim
    A preference gradient through a sampled reasoning trace is noisy, and one with an
    empty trace is biased but has low variance.  A mixture has a smaller error than
    either (BVPO, Zhu et al. 2025, arXiv:2510.05095, where alpha is fixed at 0.5).  With
    the best alpha, estimated from the gradients ("auto"), the error is at most that of
    alpha 0, 0.5, and 1, and policies are as good as with the best fixed alpha.  Here
    the truth is known: traces can be enumerated, so the gradient of the marginal
    likelihood of answers is a finite sum.

Commands
    python -m benchmarks.inputs gsm8k stories260k     (data and model, once)
    python -m experiments.bvpo             (default)
    python -m experiments.bvpo --smoke     (sanity check)
    python -m experiments.bvpo --full      (ten seeds, longer; not timed)
    Repeating a command resumes its run in OUT: runs/bvpo, runs/bvpo_smoke,
    runs/bvpo_full, or the folder of --out.

Expected
    Default, mean and standard deviation over seeds 0 to 4.

    Squared error of the gradient; "best" is auto's error divided by the least error of
    alpha 0, 0.5, and 1:

                            alpha 0       0.5           1             auto          best
        at the reference
          traces            57.9 ± 2.0    17.3 ± 0.5    11.7 ± 0.5     9.7 ± 0.4    0.83
          traces and pairs  35.3 ± 1.0    17.5 ± 0.5    34.6 ± 2.5    17.5 ± 0.5    1.00
        the same, 32 pairs
          traces            18.7 ± 2.3     5.4 ± 0.6     2.9 ± 0.1     2.5 ± 0.1    0.86
          traces and pairs  12.8 ± 1.8     5.4 ± 0.5     8.9 ± 0.6     5.3 ± 0.4    0.97
        after training
          traces            57.2 ± 1.9    17.7 ± 0.6    13.4 ± 1.8    10.9 ± 1.2    0.82
          traces and pairs  34.4 ± 3.0    17.4 ± 0.6    35.6 ± 3.6    17.4 ± 0.6    1.00

    Auto's mean alpha is within 0.02 of the closed form in every row (0.83, 0.50, 0.86,
    0.59, 0.83, and 0.49; the closed form has 0.81 and 0.48 in the last two).  The
    variance over resampled traces is 1.00 ± 0.03 times alpha squared times the exact
    variance.

        final gold reward   with a trace    with an empty trace   auto gains, paired
        before training     0.504           0.527
        alpha 0             0.486 ± 0.011   0.610 ± 0.018          0.065 ± 0.005
        alpha 0.25          0.547 ± 0.006   0.630 ± 0.011          0.003 ± 0.008
        alpha 0.5           0.554 ± 0.010   0.623 ± 0.010         -0.003 ± 0.004
        alpha 0.75          0.541 ± 0.013   0.593 ± 0.009          0.010 ± 0.007
        alpha 1             0.521 ± 0.010   0.546 ± 0.011          0.030 ± 0.006
        auto                0.551 ± 0.009   0.624 ± 0.016

    Real solutions, one batch of all questions: variance 279 at alpha 1 and 70 at 0.5
    before training, 245 and 61 after.  There the empty gradient is much smaller than
    the trace gradient (squared norms 5 and 2,300), so its bias is nearly the whole
    gradient.  The least error is at an alpha of 0.89, and at 0.72 after training.
    Time: 6.7 minutes on two cores busy with other work (load 6; jax 0.10.2, CPU).

Goals, and limitations
    Error at most that of alpha 0, 0.5, and 1: reached within the spread.  With pairs
    resampled in batches of 8, the best alpha happens to be 0.5, so nothing can be
    gained over it.  In the other rows, the error of auto is 3 to 18% smaller than the
    best of the three.
    Reward at least that of the best fixed alpha: reached within the spread, but not
    exceeded.  0.5 is best here, and auto is 0.003 ± 0.004 below it.
    The alpha learned in training is noisy: 0.28, 0.34, 0.42, 0.35, and 0.45 at the last
    step, compared with the closed form for one trace per pair at the reference of
    0.33 ± 0.02.  The error is flat near its minimum, so this costs little.
    The error is that of a single step.  With short steps, noise averages out over steps
    but bias does not, so a larger alpha than the one of least error may be better in
    the end.  This was the case in a first world, addition modulo 5.  On two development
    seeds the final rewards were 0.583 with alpha 1, 0.566 with auto, 0.556 with 0.5,
    and 0.463 with 0.

Protocol
    World: `reasoning_world.py`, sums of three numbers with a claim about two of them as
    the trace; 108 traces per prompt, gold reward 1 for the right answer.
    Reference: a Llama model with 22,240 parameters, trained on 20,000 careless
    demonstrations, half of them with an empty trace.
    Pairs: two samples from the reference for one of 100 prompts, one right and one
    wrong, independently with traces and with an empty trace; 25 prompts are held out.
    Gradients: of DPO with beta 1, for 64 pairs of each kind (`reasoning_gradients.py`).
    A step draws a batch of each kind and four traces per pair from the reference, whose
    mean is g_t; 200 steps per seed.  "traces": error relative to the marginal gradient
    of the batch's own pairs.  "traces and pairs": relative to that of all 64.  Batches
    have 8 pairs of each kind, or 32 where stated.  Closed form: theorem 2 with exact
    bias and variance.
    Auto: `ingredients` of each step's sampled gradients (all parameters, no sketch),
    averaged by `running` with decay 0.9 from the first step on, without the truth.  It
    assumes that the trace gradient is unbiased, which holds at the reference.  "After
    training" (100 steps at alpha 0.5), the reference's traces are stale and the
    assumption does not hold.
    Training: by `jaxpref.train`, 100 steps of 8 + 8 pairs, one trace per pair, AdamW,
    the same for every alpha.  There auto uses one random projection of each pair's
    gradient per probe and 22 probes per run, and its alpha is much noisier than in the
    first part.
    Reward: exact, summed over all traces; texts outside the world count 0.
    Real solutions (`bvpo_solutions.py`): 12 GSM8K test questions, stories260K, beta
    0.1, 8 steps with auto.  The steps are the trace, and the number is the answer.
    NEVER evaluate a model trained on them on GSM8K test.
    World, model, beta, batch, and step length were chosen on demonstrations of seed 100
    and pairs of seeds 100 and 101, with the prompts of z = 3 held out.  Of the learning
    rates 3e-4, 6e-4, and 1e-3, the one with the highest mean reward of alpha 0, 0.5,
    and 1 was chosen.
    Changed after seeing results: the world (not every reference learned to add modulo
    5); the held-out prompts (a first run on z = 3 ranked the alphas in the same order:
    0.495, 0.517, 0.521, 0.506, 0.484 from 0 to 1, and 0.525 for auto); and batches of
    32 were added.
"""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import bvpo_solutions as solutions
from experiments import reasoning_errors as errors
from experiments import reasoning_gradients as exact_sums
from experiments import reasoning_world as world
from experiments.bvpo_report import write_results
from experiments.noisy_sentiment import begin
from experiments.progress import say
from experiments.reasoning_gradients import Language
from experiments.sentiment_world import write_jsonl
from jaxpref import losses
from jaxpref.data import DataOptions, MixOptions, load_tokenizer
from jaxpref.errors import InputError
from jaxpref.files import write_json
from jaxpref.gradients.bvpo import mean_squared_error, optimal_alpha
from jaxpref.models import build
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.models.folder import load_params, save
from jaxpref.models.folder_config import read_architecture
from jaxpref.objectives import bvpo, from_loss, sft
from jaxpref.objectives.trace_mixture import AUTO
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.ranges import checked
from jaxpref.train import OptimizerConfig, TrainConfig, read_metrics, run


@dataclasses.dataclass(frozen=True)
class Protocol:
    """All settings that determine the result; see "Protocol" above."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    alphas: tuple[float | str, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, AUTO)
    beta: float = 1.0
    demonstrations: int = 20_000
    sft_steps: int = 800
    sft_batch: int = 128
    population: int = 64
    """Pairs of each kind whose exact gradients are computed."""
    gradient_batch: int = 8
    large_batch: int = 32
    """A second batch size, with less noise and a larger alpha."""
    traces: int = 4
    gradient_steps: int = 200
    redraws: int = 200
    decay: float = 0.9
    """Decay of auto's averages, both in measurements and in training."""
    pairs: int = 2048
    """Pairs of each kind for training."""
    steps: int = 100
    batch: int = 16
    """Pairs of both kinds."""
    learning_rate: float = 1e-3
    questions: int = 12
    """Settings for the real solutions."""
    solution_steps: int = 8
    solution_beta: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the experiment."""

    out: str | None = None
    """Output folder; repeating the command resumes the run in it.  Default: runs/bvpo,
    with the suffix _smoke or _full."""
    data: str | None = None
    """Solutions of GSM8K test questions, in pairs of a right and a wrong one (default:
    what `benchmarks.inputs` makes; with --smoke, solutions of the toy world)."""
    model: str | None = None
    """Model folder or Hub ID for these solutions, for example of SmolLM2-135M (default:
    stories260k-hf, from `benchmarks.inputs`; with --smoke, the toy world's)."""
    smoke: bool = False
    """A sanity check that takes two minutes; its numbers mean nothing."""
    full: bool = False
    """Ten seeds, longer training, and more questions; not timed."""


def choose(options: Options) -> tuple[Protocol, Path, str]:
    """The protocol, the output folder, and the approximate duration."""
    if options.smoke and options.full:
        raise InputError("--smoke and --full are two experiments: give one of them")
    protocol, out, estimate = Protocol(), "runs/bvpo", "about 10 minutes"
    if options.full:
        protocol = Protocol(
            seeds=tuple(range(10)), gradient_steps=1000, steps=200, questions=96,
            solution_steps=64, population=256,
        )  # fmt: skip
        out, estimate = f"{out}_full", "half an hour or more"
    if options.smoke:
        protocol = Protocol(
            seeds=(0,), alphas=(0.5, AUTO), demonstrations=1000, sft_steps=30,
            population=8, gradient_steps=4, redraws=4, pairs=64, steps=3, questions=3,
            solution_steps=2,
        )  # fmt: skip
        out, estimate = f"{out}_smoke", "one or two minutes"
    return protocol, Path(options.out or out), estimate


def inputs_of(options: Options, out: Path) -> tuple[Path, str | None]:
    """The solutions, and the model for them; None for the toy world's.

    Raises:
      InputError: if one is missing.
    """
    if options.smoke and options.data is None and options.model is None:
        path = out / "solutions.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, toy_solutions())
        return path, None
    path = Path(options.data or "inputs/gsm8k_solution_pairs.jsonl.gz")
    model = options.model or "inputs/stories260k-hf"
    for option, found, name in (
        ("data", path.is_file(), path),
        ("model", bool(options.model) or Path(model).is_dir(), model),
    ):
        if not found:
            raise InputError(
                f"--{option} {name}: there is no such file or folder; pass your own, "
                "or make it with `python -m benchmarks.inputs gsm8k stories260k`"
            )
    return path, model


def toy_solutions() -> list[dict]:
    """Pairs of a right and a wrong solution in the toy world, two for each prompt."""
    rows = []
    for index, prompt in enumerate(world.all_prompts()[1:]):
        x, y, z = world.numbers(prompt)
        wrong = f"so x y {x + y}\nA: {(x + y + z + 1) % len(world.NUMBERS)}"
        for trace in (f"so x y {x + y}", f"well y z {y + z}"):
            right = f"{trace}\nA: {x + y + z}"
            sides = {"chosen": right, "rejected": wrong}
            rows.append({"idx": index, "prompt": prompt, **sides})
    return rows


def main(options: Options) -> None:
    """Runs the whole experiment and writes the report."""
    if jax.process_count() > 1:
        raise InputError("this experiment is small: run it in one process")
    protocol, out, estimate = choose(options)
    data, solver = inputs_of(options, out)
    new = begin(protocol, out)
    started = time.perf_counter()
    clock = functools.partial(say, started)
    runs = len(protocol.seeds) * len(protocol.alphas)
    clock(f"{runs} preference runs; {estimate} on two cores")

    reference = train_reference(protocol, out)
    model, base, language = _load(reference)
    judge = functools.partial(final_rewards, model, language=language)
    start = judge(base)
    clock(
        f"reference trained: reward {start['reward']:.3f}, with an empty trace "
        f"{start['empty_reward']:.3f}, {start['language']:.1%} in the language"
    )

    trained, gradients, learned = [], [], []
    for seed in protocol.seeds:
        write_pairs(protocol, model, base, language, out, seed)
        after = None
        for alpha in protocol.alphas:
            folder = out / "runs" / f"{alpha}-{seed}"
            export = run(preference_run(protocol, alpha, seed, reference, out, folder))
            params = load_params(export, model)
            after = params if alpha == 0.5 else after
            trained.append({"alpha": alpha, "seed": seed, **judge(params)})
            clock(f"alpha {alpha}, seed {seed}: {trained[-1]['reward']:.3f}")
            if alpha == AUTO:
                lines = read_metrics(folder / "metrics.jsonl")
                learned += [{"seed": seed, **x} for x in lines if "bvpo/alpha" in x]
        small, large = protocol.gradient_batch, protocol.large_batch
        places = {
            "at the reference": (base, small),
            f"at the reference, {large} pairs": (base, large),
            "after training": (after, small),
        }
        for number, (place, (params, batch)) in enumerate(places.items()):
            path = out / "gradients" / f"{number}-{seed}.json"
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                found = measure_gradients(
                    protocol, model, params, base, language, seed, batch=batch
                )
                write_json(path, {"place": place, "seed": seed, **found})
            gradients.append(json.loads(path.read_text()))
        clock(f"seed {seed}: gradients measured")
    real = solutions.measure(
        str(data),
        solver or str(reference),
        out / "solutions",
        questions=protocol.questions,
        steps=protocol.solution_steps,
        beta=protocol.solution_beta,
    )
    clock("real solutions measured")
    write_results(
        out,
        protocol=protocol,
        reference=start,
        gradients=gradients,
        trained=trained,
        learned=learned,
        real=real,
        # Work of an earlier process is not included in the time.
        seconds=time.perf_counter() - started if new else None,
        about=__doc__,
    )


# ---- the reference: a small Llama trained from scratch on demonstrations -----------


def train_reference(protocol: Protocol, out: Path) -> Path:
    """Trains a randomly initialized model and returns the folder of its export."""
    start, rows = out / "world" / "untrained", out / "world" / "demonstrations.jsonl"
    if not start.is_dir():
        tokenizer = out / "world" / "tokenizer"
        world.write_tokenizer(tokenizer)
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        write_json(tokenizer / "config.json", ids)
        model = build(model_config())
        save(start, model, model.init(jax.random.key(0)), source_folder=tokenizer)
    if not rows.exists():
        write_jsonl(rows, world.write_demonstrations(protocol.demonstrations, seed=0))
    return run(
        TrainConfig(
            model=str(start),
            data=str(rows),
            out=str(out / "sft"),
            objective=sft(),
            max_steps=protocol.sft_steps,
            batch_size=protocol.sft_batch,
            save_every=protocol.sft_steps,
            logit_chunk=16,
            options=DataOptions(heldout_fraction=0.0),
            optimizer=OptimizerConfig(
                learning_rate=5e-3, warmup_steps=protocol.sft_steps // 10, adam_b2=0.95
            ),
        )
    )


def model_config() -> LlamaArchitecture:
    """A Llama model with 22,240 parameters."""
    return LlamaArchitecture(
        vocab_size=len(world.VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        max_position_embeddings=32,
        initializer_range=0.1,
    )


# ---- pairs: samples from the reference, ranked by the gold reward ------------------


def write_pairs(protocol: Protocol, model, base, language, out: Path, seed: int):
    """Writes the two files of a seed's pairs, if missing."""
    paths = [_pairs_file(out, kind, seed) for kind in ("trace", "empty")]
    if all(path.exists() for path in paths):
        return
    prompts, traces = world.all_prompts(), world.all_traces()
    train, _ = world.split_prompts()
    scored = exact_sums.answer_logps(model, base, language, train)
    rng = np.random.default_rng(seed)
    with_trace, without = world.draw_pairs(rng, *scored, train, protocol.pairs)
    rows = [
        world.trace_pair(
            prompts[x], (traces[a], world.NUMBERS[w]), (traces[b], world.NUMBERS[l])
        )
        for x, w, l, a, b in with_trace
    ]
    write_jsonl(paths[0], rows)
    rows = [
        {"prompt": prompts[x], "chosen": world.NUMBERS[w], "rejected": world.NUMBERS[l]}
        for x, w, l, *_ in without
    ]
    write_jsonl(paths[1], rows)


def _pairs_file(out: Path, kind: str, seed: int) -> Path:
    return out / "world" / f"{kind}-{seed}.jsonl"


# ---- training and measuring --------------------------------------------------------


def preference_run(protocol, alpha, seed: int, reference, out, folder) -> TrainConfig:
    """The config of one preference training run."""
    base = from_loss(losses.dpo, beta=protocol.beta)
    decay = {"decay": protocol.decay} if alpha == AUTO else {}
    return TrainConfig(
        model=str(reference),
        data=str(_pairs_file(out, "trace", seed)),
        out=str(folder),
        objective=bvpo(base, alpha=alpha, **decay),
        mix=MixOptions(empty_data=str(_pairs_file(out, "empty", seed))),
        max_steps=protocol.steps,
        batch_size=protocol.batch,
        seed=seed,
        log_every=max(protocol.steps // 20, 1),
        save_every=protocol.steps,
        keep_checkpoints=1,
        logit_chunk=16,
        options=DataOptions(heldout_fraction=0.0),
        optimizer=OptimizerConfig(
            learning_rate=protocol.learning_rate,
            warmup_steps=protocol.steps // 10,
        ),
    )


def final_rewards(model, params, *, language: Language) -> dict[str, float]:
    """Exact gold rewards on the held-out prompts; see `expected_rewards`."""
    _, held = world.split_prompts()
    joint, empty = exact_sums.answer_logps(model, params, language, held)
    rewards = world.gold_rewards(world.all_prompts())[held]
    return exact_sums.expected_rewards(joint, empty, rewards)


def measure_gradients(
    protocol: Protocol, model, params, base, language, seed: int, *, batch: int
) -> dict:
    """Errors of mixed gradients for each alpha and for auto (`reasoning_errors.py`)."""
    train, _ = world.split_prompts()
    scored = exact_sums.answer_logps(model, base, language, train)
    rng = np.random.default_rng([seed, 1])
    drawn = world.draw_pairs(rng, *scored, train, protocol.population)
    sides = [pairs[:, :3] for pairs in drawn]
    beta = protocol.beta
    population = errors.make_population(
        model, params, base, language, *sides, beta=beta
    )
    truth = errors.true_ingredients(population, batch=batch, traces=protocol.traces)
    of_steps, of_redraws = jax.random.split(jax.random.key(seed))
    records = errors.measure_errors(
        model,
        params,
        language,
        tuple(vars(population).values()),
        of_steps,
        steps=protocol.gradient_steps,
        batch=batch,
        traces=protocol.traces,
        beta=beta,
        decay=protocol.decay,
    )
    kinds = {
        kind: {
            "errors": errors.errors_by_alpha(found),
            "auto": float(np.mean(found["auto"])),
            "auto_alpha": float(np.mean(found["alpha"])),
            "auto_alpha_std": float(np.std(found["alpha"])),
            "best_alpha": (best := float(optimal_alpha(**truth[kind]))),
            "closed": float(mean_squared_error(best, **truth[kind])),
            "truth": truth[kind],
        }
        for kind, found in records.items()
    }
    redraws = errors.measure_variances(
        model,
        params,
        language,
        population,
        of_redraws,
        batch=protocol.gradient_batch,
        redraws=protocol.redraws,
        beta=beta,
    )
    return {"kinds": kinds, "variances": redraws}


def _load(folder: Path):
    model = build(read_architecture(folder))
    return (
        model,
        load_params(folder, model),
        exact_sums.read_language(load_tokenizer(folder)),
    )


if __name__ == "__main__":
    with entry_point():
        main(checked(tyro.cli(Options, description=__doc__)))
