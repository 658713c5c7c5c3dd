"""What wrong labels cost DPO, and what a corrected loss buys, at matched KL.

Claim
    Flips at one rate for all pairs shrink the margins that DPO (Rafailov et al. 2023,
    arXiv:2305.18290) learns, and add variance.  They hardly change the direction of
    the margins (Li and Duan 1989), so a smaller beta restores the scale, and only the
    variance costs reward.
    rDPO (Ray Chowdhury et al. 2024, arXiv:2403.00409) and the forward-corrected
    likelihood (2512.00709) learn the margins of clean labels at the beta for clean
    labels, and do not remove the variance: at the same KL they are hardly better than
    DPO with a tuned beta (`exact_frontier.py`).

Commands
    python -m experiments.noisy_sentiment             (default)
    python -m experiments.noisy_sentiment --smoke     (sanity check)
    python -m experiments.noisy_sentiment --full      (hours)
    Repeating a command resumes its run in OUT: runs/noisy_sentiment,
    runs/noisy_sentiment_smoke, runs/noisy_sentiment_full, or the folder of --out.
    `--full` writes frontier.json.  Its copy, experiments/noisy_sentiment_full.json, is
    the sweep over which the default draws its runs.

Expected
    `--full`, mean and standard deviation over seeds 0 to 4; shares of the best possible
    reward at each run's own KL (none where the samples of the reference do not reach):

                      beta    gold reward   KL to reference   share        malformed
        DPO, no flips    4    0.25 ± 0.04     0.05 ± 0.00     0.69 ± 0.08    1.3%
        DPO, no flips    2    0.50 ± 0.04     0.18 ± 0.01     0.69 ± 0.03    1.3%
        DPO, no flips    1    0.95 ± 0.05     0.63 ± 0.02     0.69 ± 0.03    1.6%
        DPO, 40%       0.2    0.59 ± 0.07     0.41 ± 0.05     0.54 ± 0.03    1.8%
        DPO, 40%       0.1    0.98 ± 0.26     1.30 ± 0.33     0.50 ± 0.16    3.5%
        DPO, 40%      0.05    0.84 ± 1.18     3.42 ± 2.62     0.52 ± 0.06   12.1%
        DPO, 40%     0.025    0.64 ± 1.72     3.80 ± 2.96     0.50 ± 0.04   15.5%
        rDPO, 40%        4    0.51 ± 0.22     0.58 ± 0.34     0.45 ± 0.21    3.6%
        rDPO, 40%        2    0.68 ± 0.08     0.61 ± 0.16     0.52 ± 0.08    2.3%
        rDPO, 40%        1    0.93 ± 0.10     1.01 ± 0.17     0.53 ± 0.05    2.2%
        rDPO, 40%      0.5    0.28 ± 2.17     4.10 ± 5.31     0.54 ± 0.02   20.1%
        forward, 40%     4    0.89 ± 0.35     3.51 ± 0.76     0.34 ± 0.02    1.3%
        forward, 40%     2    1.05 ± 0.34     2.99 ± 0.61     0.33 ± 0.08    5.4%
        forward, 40%     1    1.09 ± 0.33     2.42 ± 0.65     0.41 ± 0.14    4.5%
        forward, 40%   0.5    0.49 ± 1.59     5.78 ± 8.14     0.47 ± 0.17   16.9%

    At a KL of 0.5, clean labels give a reward of 0.85, DPO on flips 0.63, and rDPO
    0.65 (+0.02, 95% interval -0.08 to +0.11).  At 1, DPO on flips has 0.90, and rDPO
    0.79 (-0.11, -0.21 to -0.01).  So in this experiment, rDPO is no better than DPO
    with a smaller beta, and worse at the larger KL.  No beta of forward DPO stays
    within a KL of 1, so it has no tuned beta.  The smallest betas of all three losses
    leave the language in single draws, which explains the large deviations.
    The default is the part of this sweep with seeds 0 and 1 and seven of the settings.
    Time: the default 9.7 minutes, with nothing compiled before, on two idle cores of an
    Intel Xeon.  `--full` 104 minutes (84 of CPU time) beside other work.

Protocol
    World: `sentiment_world.py`, a grammar of reviews with an exact gold reward.
    Reference: a Llama model with 0.23 M parameters, trained from scratch on 20,000
    reviews, 300 steps of 128.
    Pairs: for each seed, 16,384 new pairs of samples from the reference at temperature
    1.
    Labels: Bradley-Terry draws from the gold reward, P = s(2 (r_a - r_b)), then each
    flipped with the known rate.  With hard labels for the better review, DPO's optimum
    would be at infinity, and results would depend only on when training stops.  With
    draws, DPO on clean labels has a known optimum, ref(y|x) exp(2 r(x, y) / beta) /
    Z(x), on the line "best possible" in the report.
    Training: one pass over the pairs (no pair is repeated, so no label is memorized),
    256 steps of 64 pairs, with the same pairs in the same order for every arm.
    Optimizer: the same momentum with steps of constant length for all arms.  The scale
    of a loss would otherwise determine its step: rDPO's gradient is 5 times DPO's, and
    forward DPO's a fifth.
    Measured on 1,920 samples of each policy: gold reward, and KL to the reference
    (exact for the next token, Monte Carlo over the prefix).
    Best possible: from 49,152 samples of the reference.  Share of it: a run's gain over
    the reference, divided by the largest possible gain at the run's own KL.
    Reward at matched KL: along a method's betas, piecewise linear in the root of the
    KL, for each draw; differences are paired by draw, with 95% t intervals.
    Tuning rule, the same for every loss: the beta with the most reward at a KL of at
    most 1 on seed 100 (in `--full`); reported on seeds 0 to 4.

What held DPO on clean labels back
    Single runs on pairs of seed 100 with another reference (38,400 reviews), tried in a
    prototype and not reproducible with the commands above:

                                           KL    reward  share  malformed  training loss
        momentum, constant step length     0.71  0.98    0.65   1.5%       0.52
        Adam, 1e-3, 256 steps of 64        1.59  1.59    0.70   4.5%       0.43
        Adam, 5e-4, 512 steps of 32        1.47  1.57    0.72   4.2%       0.43
        Adam, 3e-3, 256 steps of 64        17.6  -3.27   –      88%        0.46
        Adam, 1e-3, 256 steps of 64, beta 2  0.51  0.84  0.67   3.2%       0.44

    The training loss is that of the last quarter (0.693 at the start, 0.313 is the
    entropy of the labels).  So the policies had not converged, and larger steps lead to
    malformed reviews.  Malformed reviews have the lowest reward, and DPO raises their
    probability: at 5e-4, well-formed samples alone have a reward of 1.82.
    A reference with fewer malformed samples (0.9%, from 60,000 reviews and 1,000 steps)
    with Adam at 5e-4 was no cure in the default's runs: DPO on clean labels ended at
    rewards of 0.85 and 0.88 and KLs of 1.50 and 0.96 (seeds 0 and 1), and forward DPO
    of seed 0 left the language (beta 1: 0.01 at a KL of 3.06; beta 2: -3.98 at 11.39).
    So momentum with steps of constant length stays.
    The best possible curve is not the cause: two halves of 512 samples per prompt
    differ by 3% in reward at equal tilts, and 8 of 16,384 pairs are left out as equal.
    Nor are the labels: `exact_frontier.py` has the same world without an optimizer, and
    there, DPO on 16,384 clean labels reaches 100% of the best possible.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import sentiment_world as world
from experiments.progress import say
from experiments.sentiment_report import COMMITTED, write_results
from jaxpref import losses
from jaxpref.data import DataOptions, InjectOptions, encode_prompt, load_tokenizer
from jaxpref.errors import InputError
from jaxpref.files import write_json
from jaxpref.models import build
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.models.folder import save
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.weights import load_weights
from jaxpref.objectives import from_loss, sft
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.ranges import checked
from jaxpref.sampling import generate, pad
from jaxpref.scoring.run_weights import named_weights
from jaxpref.train import (
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    make_mesh,
    read_metrics,
    run,
)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """All settings that determine the result; see "Protocol" above."""

    seeds: tuple[int, ...] = (0, 1)
    tuning_seeds: tuple[int, ...] = ()
    flip_rate: float = 0.4
    clean_betas: tuple[float, ...] = (1.0,)
    dpo_betas: tuple[float, ...] = (0.1, 0.2)
    corrected_betas: tuple[float, ...] = (1.0, 2.0)
    sft_reviews: int = 20_000
    sft_steps: int = 300
    sft_batch: int = 128
    pairs: int = 16_384
    steps: int = 256
    batch: int = 64
    learning_rate: float = 1.0
    adam_eps: float = 1.0
    max_grad_norm: float = 0.1
    reference_samples: int = 49_152
    heldout_pairs: int = 512
    evaluated_samples: int = 1920


@dataclasses.dataclass(frozen=True)
class Arm:
    """A loss, its options, and a flip rate."""

    name: str
    loss: Callable
    flip_rate: float
    options: dict

    @property
    def folder(self) -> str:
        """Folder name of the arm under OUT/runs."""
        percent, beta = round(100 * self.flip_rate), self.options["beta"]
        return f"{self.loss.__name__}-{percent}-{beta:g}"


CLEAN = "DPO, no flips"


def make_arms(protocol: Protocol) -> list[Arm]:
    """Every method at each of its betas; all see the same pairs in the same order."""
    rate = protocol.flip_rate
    at, known = f", {100 * rate:.0f}% flips", {"flip_rate": rate}
    sweeps = [
        (CLEAN, losses.dpo, 0.0, {}, protocol.clean_betas),
        (f"DPO{at}", losses.dpo, rate, {}, protocol.dpo_betas),
        (f"rDPO{at}", losses.rdpo, rate, known, protocol.corrected_betas),
        (f"forward DPO{at}", losses.forward_dpo, rate, known, protocol.corrected_betas),
    ]
    return [
        Arm(name, loss, flips, {"beta": beta, **options})
        for name, loss, flips, options, betas in sweeps
        for beta in betas
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the experiment."""

    out: str | None = None
    """Output folder; repeating the command resumes the run in it.  Default:
    runs/noisy_sentiment, with the suffix _smoke or _full."""
    smoke: bool = False
    """A sanity check that takes a minute; its numbers mean nothing."""
    full: bool = False
    """Five draws of the flips, more betas, and a draw for tuning; over an hour."""


def choose(options: Options) -> tuple[Protocol, Path, str]:
    """The protocol, the output folder, and the approximate duration."""
    if options.smoke and options.full:
        raise InputError("--smoke and --full cannot be combined")
    protocol, out, estimate = Protocol(), "runs/noisy_sentiment", "under 10 minutes"
    if options.full:
        protocol = Protocol(
            seeds=(0, 1, 2, 3, 4), tuning_seeds=(100,), clean_betas=(1.0, 2.0, 4.0),
            dpo_betas=(0.025, 0.05, 0.1, 0.2), corrected_betas=(0.5, 1.0, 2.0, 4.0),
        )  # fmt: skip
        out, estimate = f"{out}_full", "over an hour"
    if options.smoke:
        protocol = Protocol(
            seeds=(0,), dpo_betas=(0.1,), corrected_betas=(1.0,), sft_reviews=2000,
            sft_steps=40, sft_batch=64, pairs=640, steps=8, reference_samples=2400,
            heldout_pairs=64, evaluated_samples=240,
        )  # fmt: skip
        out, estimate = f"{out}_smoke", "about a minute"
    return protocol, Path(options.out or out), estimate


def begin(protocol: Protocol, out: Path) -> bool:
    """Opens OUT; returns whether it is new.  Raises if its protocol differs."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "protocol.json"
    asked = json.loads(json.dumps(dataclasses.asdict(protocol)))
    if not path.exists():
        write_json(path, asked)
        return True
    try:
        before = dict(json.loads(path.read_text()))
    except ValueError as error:
        raise InputError(f"{path}: is not a protocol; use another --out") from error
    names = sorted(n for n in before | asked if before.get(n) != asked.get(n))
    if names:
        changes = (f"{n} was {before.get(n)}, is {asked.get(n)}" for n in names)
        raise InputError(
            f"{out}: has another protocol ({'; '.join(changes)}); use another --out"
        )
    return False


def main(options: Options) -> None:
    """Runs the whole experiment and writes the report."""
    if jax.process_count() > 1:
        raise InputError("this experiment is small: run it in one process")
    protocol, out, estimate = choose(options)
    new = begin(protocol, out)
    arms = make_arms(protocol)
    seeds = protocol.tuning_seeds + protocol.seeds
    started = time.perf_counter()
    clock = functools.partial(say, started)
    runs = len(arms) * len(seeds)
    clock(f"{runs} preference runs; {estimate} on two cores")

    mesh = make_mesh(MeshConfig())
    reference = train_reference(protocol, out)
    clock("reference trained")
    pairs = functools.partial(write_pairs, reference=reference, mesh=mesh)
    for seed in seeds:
        pairs(out / "world" / f"pairs-{seed}.jsonl", count=protocol.pairs, seed=seed)
    pairs(out / "world" / "heldout.jsonl", count=protocol.heldout_pairs, seed=999)
    rewards = reference_rewards(protocol, reference, out, mesh=mesh)
    clock("reference and pairs sampled")

    records, curves = [], []
    began = time.perf_counter()
    for done, (seed, arm) in enumerate((s, a) for s in seeds for a in arms):
        folder = out / "runs" / f"{arm.folder}-{seed}"
        config = preference_run(protocol, arm, seed, reference, out, folder)
        with jax.set_mesh(mesh):
            measured = trained_and_measured(protocol, config, reference, seed)
        beta = arm.options["beta"]
        records.append({"arm": arm.name, "beta": beta, "seed": seed, **measured})
        lines = read_metrics(folder / "metrics.jsonl")
        label = f"{arm.name}, beta {beta:g}"
        curves += [{"arm": label, "seed": seed, **line} for line in lines]
        left = (time.perf_counter() - began) / (done + 1) * (runs - done - 1)
        reward, kl = measured["reward"], measured["kl"]
        clock(
            f"run {done + 1} of {runs}: {label}, seed {seed}: reward {reward:.2f}, "
            f"KL {kl:.2f}; about {left / 60:.1f} min left"
        )
    is_default = not (options.smoke or options.full)
    write_results(
        out,
        protocol=protocol,
        baseline=arms[len(protocol.clean_betas)].name,
        records=records,
        best=world.best_possible_curve(rewards),
        curves=curves,
        over=COMMITTED if is_default and COMMITTED.exists() else None,
        # Work of an earlier process is not included in the time.
        seconds=time.perf_counter() - started if new else None,
        about=__doc__,
    )


# ---- the reference: a small llama trained from scratch on reviews ------------------


def train_reference(protocol: Protocol, out: Path) -> Path:
    """Trains a randomly initialized model and returns the folder of its export."""
    start, reviews = out / "world" / "untrained", out / "world" / "reviews.jsonl"
    if not start.is_dir():
        tokenizer = out / "world" / "tokenizer"
        world.write_tokenizer(tokenizer)
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        (tokenizer / "config.json").write_text(json.dumps(ids))
        model = build(
            LlamaArchitecture(
                vocab_size=len(world.SPECIAL) + len(world.WORDS),
                hidden_size=96,
                intermediate_size=256,
                num_layers=2,
                num_heads=4,
                num_kv_heads=4,
                head_dim=24,
                max_position_embeddings=64,
                initializer_range=0.1,
            )
        )
        save(start, model, model.init(jax.random.key(0)), source_folder=tokenizer)
    if not reviews.exists():
        written = world.write_reviews(protocol.sft_reviews, seed=0)
        rows = [{"prompt": p, "completion": f" {text}"} for p, text in written]
        world.write_jsonl(reviews, rows)
    return run(
        TrainConfig(
            model=str(start),
            data=str(reviews),
            out=str(out / "sft"),
            objective=sft(),
            max_steps=protocol.sft_steps,
            batch_size=protocol.sft_batch,
            save_every=protocol.sft_steps,
            logit_chunk=16,
            options=DataOptions(heldout_fraction=0.0),
            optimizer=OptimizerConfig(
                learning_rate=3e-3, warmup_steps=protocol.sft_steps // 10, adam_b2=0.95
            ),
        )
    )


# ---- pairs: two samples of the reference, labeled by the gold reward --------------


def write_pairs(path: Path, reference: Path, count: int, *, seed: int, mesh):
    """Writes pairs with clean labels, if missing (labels are flipped in training)."""
    if not path.exists():
        with jax.set_mesh(mesh):
            rows = make_pairs(reference, count, seed=seed)
        world.write_jsonl(path, rows)


def make_pairs(reference: Path, count: int, *, seed: int) -> list[dict]:
    """`count` pairs of different reviews with Bradley-Terry labels."""
    prompts = world.all_prompts()
    asked = [prompts[i % len(prompts)] for i in range(count)]
    texts, *_ = sample(reference, asked * 2, seed=seed)
    rewards = [world.gold_reward(p, text) for p, text in zip(asked * 2, texts)]
    first_wins = world.prefer(rewards[:count], rewards[count:], seed=seed)
    rows = []
    for n, (prompt, wins) in enumerate(zip(asked, first_wins)):
        chosen, rejected = (n, count + n) if wins else (count + n, n)
        if texts[n] != texts[count + n] and texts[n] and texts[count + n]:
            rows.append(
                {
                    "prompt": prompt,
                    "chosen": f" {texts[chosen]}",
                    "rejected": f" {texts[rejected]}",
                    "rewards": [rewards[chosen], rewards[rejected]],
                }
            )
    return rows


def reference_rewards(protocol: Protocol, reference: Path, out: Path, *, mesh):
    """Gold rewards of new samples from the reference: [prompts, samples]."""
    path = out / "world" / "reference_rewards.jsonl"
    if not path.exists():
        prompts = world.all_prompts()
        asked = prompts * (protocol.reference_samples // len(prompts))
        with jax.set_mesh(mesh):
            texts, *_ = sample(reference, asked, seed=998)
        rewards = [world.gold_reward(p, text) for p, text in zip(asked, texts)]
        by_prompt = np.reshape(rewards, (-1, len(prompts))).T.tolist()
        rows = [{"prompt": p, "rewards": r} for p, r in zip(prompts, by_prompt)]
        world.write_jsonl(path, rows)
    rows = map(json.loads, path.read_text().splitlines())
    return np.array([row["rewards"] for row in rows])


def sample(folder: Path, prompts: list[str], *, seed: int, batch: int = 1024):
    """Samples one completion per prompt: texts, tokens, prompt length, lengths.

    A text that did not end is marked with a final "<unk>", so it is not a valid review.
    """
    tokenizer, model, params = _load(folder)
    ids = {prompt: encode_prompt(tokenizer, prompt) for prompt in set(prompts)}
    (length,) = set(map(len, ids.values()))  # all prompts have the same length
    rows = [ids[prompt] for prompt in prompts]
    rows += rows[:1] * (-len(rows) % batch)
    drawn, lengths = [], []
    for start in range(0, len(rows), batch):
        new, new_lengths, *_ = generate(
            model,
            params,
            *pad(rows[start : start + batch], length),
            jax.random.fold_in(jax.random.key(seed), start),
            max_new_tokens=world.MAX_COMPLETION_TOKENS,
            stop_tokens=(tokenizer.eos_token_id,),
        )
        drawn.append(np.asarray(new))
        lengths.append(np.asarray(new_lengths))
    count = len(prompts)
    drawn, lengths = np.concatenate(drawn)[:count], np.concatenate(lengths)[:count]
    words = np.array(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    texts = []
    for row, n in zip(drawn, lengths):
        ended = row[n - 1] == tokenizer.eos_token_id
        texts.append(" ".join([*words[row[: n - 1]], *([] if ended else ["<unk>"])]))
    tokens = np.concatenate([np.array(rows[:count], np.int32), drawn], axis=1)
    return texts, tokens, length, lengths


# ---- training and measuring --------------------------------------------------------


def preference_run(protocol, arm: Arm, seed: int, reference, out, folder):
    """The config of one preference training run."""
    return TrainConfig(
        model=str(reference),
        data=str(out / "world" / f"pairs-{seed}.jsonl"),
        eval_data=str(out / "world" / "heldout.jsonl"),
        out=str(folder),
        objective=from_loss(arm.loss, **arm.options),
        max_steps=protocol.steps,
        batch_size=protocol.batch,
        seed=seed,
        log_every=8,
        eval_every=max(protocol.steps // 4, 1),
        save_every=protocol.steps,
        keep_checkpoints=1,
        logit_chunk=16,
        options=DataOptions(
            inject=InjectOptions(flip_rate=arm.flip_rate, seed=seed),
            # The world has few prompts, and all of them occur in training.
            allow_shared_prompts=True,
        ),
        # The gradients of every loss are clipped to a norm below all of theirs, and
        # a large epsilon disables Adam's normalization: momentum with steps of
        # constant length.  See "Optimizer" in the module's docstring.
        optimizer=OptimizerConfig(
            learning_rate=protocol.learning_rate,
            max_grad_norm=protocol.max_grad_norm,
            adam_eps=protocol.adam_eps,
            warmup_steps=protocol.steps // 12,
        ),
    )


def trained_and_measured(
    protocol: Protocol, config: TrainConfig, reference: Path, seed: int
) -> dict:
    """Trains and measures a policy, unless an earlier command has."""
    path = Path(config.out) / "measured.json"
    if not path.exists():
        export = run(config)
        write_json(path, measure(protocol, export, reference, seed=1000 + seed))
    return json.loads(path.read_text())


def measure(protocol: Protocol, folder: Path, reference: Path, *, seed: int) -> dict:
    """Samples a policy: gold reward, KL to the reference, share of malformed reviews.

    The KL is the sum over positions of the exact divergence between the next-token
    distributions, averaged over sampled completions (Monte-Carlo over prefixes only,
    which has less variance than the mean log-ratio of the samples).
    """
    prompts = world.all_prompts()
    asked = prompts * (protocol.evaluated_samples // len(prompts))
    texts, tokens, start, lengths = sample(folder, asked, seed=seed)
    rewards = [world.gold_reward(p, text) for p, text in zip(asked, texts)]
    malformed = [world.read_review(text.split()) is None for text in texts]
    (_, model, params), (_, _, base) = _load(folder), _load(reference)
    inside = np.arange(tokens.shape[1] - start) < lengths[:, None]
    kl = divergence(model, params, base, tokens, inside, start=start)
    return {
        "reward": float(np.mean(rewards)),
        "reward_error": float(np.std(rewards) / np.sqrt(len(rewards))),
        "kl": float(jnp.mean(kl)),
        "malformed": float(np.mean(malformed)),
        "words": float(np.mean(lengths) - 1),
        "samples": texts[:: len(asked) // 8][:8],
    }


@functools.partial(jax.jit, static_argnums=0, static_argnames="start")
def divergence(model, params, base, tokens, inside, *, start: int):
    """KL(policy || reference) of the next token, summed over a completion: [N]."""
    log_p, log_q = (
        jax.nn.log_softmax(model.logits(weights, tokens)[:, start - 1 : -1])
        for weights in (params, base)
    )
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q) * inside[..., None], axis=(1, 2))


def _load(folder: Path):
    """The tokenizer, model and parameters of a folder, or of a run's checkpoint."""
    weights = named_weights(str(folder), None)
    model = build(read_architecture(weights.folder))
    return load_tokenizer(weights.folder), model, load_weights(weights, model)


if __name__ == "__main__":
    with entry_point():
        main(checked(tyro.cli(Options, description=__doc__)))
