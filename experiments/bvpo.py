"""DOCSTRING."""

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
from experiments.reasoning_gradients import Language
from experiments.sentiment_world import write_jsonl
from jaxpref import losses
from jaxpref.data import DataOptions, MixOptions, load_tokenizer
from jaxpref.errors import InputError
from jaxpref.files import write_json
from jaxpref.gradients.bvpo import mean_squared_error, optimal_alpha
from jaxpref.models import ModelConfig, build
from jaxpref.models.huggingface import load_config, load_params, save
from jaxpref.train import (
    OptimizerConfig,
    TrainConfig,
    from_loss,
    read_metrics,
    run,
    sft,
)
from jaxpref.train.bvpo import AUTO, bvpo
from jaxpref.train.entry import entry_point


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything that decides the result; see "Protocol" in the module's docstring."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    alphas: tuple[float | str, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, AUTO)
    beta: float = 1.0
    demonstrations: int = 20_000
    sft_steps: int = 800
    sft_batch: int = 128
    population: int = 64
    """Pairs of each kind whose gradients are known exactly."""
    gradient_batch: int = 8
    large_batch: int = 32
    """A second size, where there is less noise and alpha is larger."""
    traces: int = 4
    gradient_steps: int = 200
    redraws: int = 200
    decay: float = 0.9
    """Of the averages of auto, in the measured gradients and in training."""
    pairs: int = 2048
    """Of each kind, for training."""
    steps: int = 100
    batch: int = 16
    """Pairs of both kinds together."""
    learning_rate: float = 1e-3
    questions: int = 12
    """Of the real solutions."""
    solution_steps: int = 8
    solution_beta: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How much of the experiment to run."""

    out: str | None = None
    """Folder for everything; the same command resumes what was begun in it.  Without
    it: runs/bvpo, with _smoke or _full behind."""
    data: str = "../shared/data/gsm8k_solution_pairs.jsonl.gz"
    """Solutions of GSM8K test questions, right and wrong ones paired."""
    model: str = "../shared/models/stories260k-hf"
    """Model folder or hub id for those solutions, e.g. of SmolLM2-135M."""
    smoke: bool = False
    """Only see that it works: a minute, and numbers that mean nothing."""
    full: bool = False
    """Ten seeds, longer training and more questions: about half an hour."""


def choose(options: Options) -> tuple[Protocol, Path, str]:
    """What is run, where it goes, and about how long it takes."""
    if options.smoke and options.full:
        raise InputError("--smoke and --full are two experiments: give one of them")
    protocol, out, estimate = Protocol(), "runs/bvpo", "about 10 minutes"
    if options.full:
        protocol = Protocol(
            seeds=tuple(range(10)), gradient_steps=1000, steps=200, questions=96,
            solution_steps=64, population=256,
        )  # fmt: skip
        out, estimate = f"{out}_full", "about half an hour"
    if options.smoke:
        protocol = Protocol(
            seeds=(0,), alphas=(0.5, AUTO), demonstrations=1000, sft_steps=30,
            population=8, gradient_steps=4, redraws=4, pairs=64, steps=3, questions=3,
            solution_steps=2,
        )  # fmt: skip
        out, estimate = f"{out}_smoke", "about a minute"
    return protocol, Path(options.out or out), estimate


def main(options: Options) -> None:
    """The experiment, from nothing to the report."""
    if jax.process_count() > 1:
        raise InputError("this experiment is small: run it in one process")
    protocol, out, estimate = choose(options)
    if not Path(options.data).is_file():
        raise InputError(f"--data {options.data}: there is no such file; name yours")
    new = begin(protocol, out)
    if not jax.config.jax_compilation_cache_dir:
        # The seeds of an arm run the same program: compile it once.
        jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    started = time.perf_counter()
    clock = functools.partial(_say, started)
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

    trained, gradients, learnt = [], [], []
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
                learnt += [{"seed": seed, **x} for x in lines if "bvpo/alpha" in x]
        small, large = protocol.gradient_batch, protocol.large_batch
        places = {
            "at the reference": (base, small),
            f"at the reference, batches of {large}": (base, large),
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
        options.data,
        options.model,
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
        learnt=learnt,
        real=real,
        # What an earlier process did is not in this one's time.
        seconds=time.perf_counter() - started if new else None,
        about=__doc__,
    )


# ---- the reference: a small llama trained from scratch on demonstrations -----------


def train_reference(protocol: Protocol, out: Path) -> Path:
    """Makes a randomly initialised model folder and trains it; returns the export."""
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


def model_config() -> ModelConfig:
    """A llama of 22,240 parameters."""
    return ModelConfig(
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


# ---- pairs: samples of the reference, ranked by the gold reward --------------------


def write_pairs(protocol: Protocol, model, base, language, out: Path, seed: int):
    """Two files of the seed's pairs, if not there."""
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
    """The engine's config of one preference run."""
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
    """Exact gold rewards on the prompts held out; see `expected_rewards`."""
    _, held = world.split_prompts()
    joint, empty = exact_sums.answer_logps(model, params, language, held)
    rewards = world.gold_rewards(world.all_prompts())[held]
    return exact_sums.expected_rewards(joint, empty, rewards)


def measure_gradients(
    protocol: Protocol, model, params, base, language, seed: int, *, batch: int
) -> dict:
    """Errors of mixed gradients by alpha, and auto's; see `reasoning_errors.py`."""
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
    model = build(load_config(folder))
    return (
        model,
        load_params(folder, model),
        exact_sums.read_language(load_tokenizer(folder)),
    )


def _say(started: float, text: str) -> None:
    print(f"[{(time.perf_counter() - started) / 60:5.1f} min] {text}", flush=True)


if __name__ == "__main__":
    with entry_point():
        main(tyro.cli(Options, description=__doc__))
