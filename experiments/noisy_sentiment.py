"""Label noise hurts DPO on a small language model, and robust losses recover.

Claim
    With 40% of the labels flipped, DPO (Rafailov et al. 2023, arXiv:2305.18290) loses
    most of its gain on clean labels.  rDPO (Ray Chowdhury et al. 2024,
    arXiv:2403.00409) and the forward-corrected likelihood (2512.00709) keep most of it.
    The reason: DPO fits the observed labels, P = (1 - e) p + e (1 - p), and converges
    to a margin of logit P instead of logit p, here about an eighth.  The corrected
    losses converge to logit p.  The paper uses GPT-2 large on IMDb.

Commands
    python -m experiments.noisy_sentiment             (default)
    python -m experiments.noisy_sentiment --smoke     (sanity check)
    python -m experiments.noisy_sentiment --full      (over an hour)
    Repeating a command resumes its run in OUT: runs/noisy_sentiment,
    runs/noisy_sentiment_smoke, runs/noisy_sentiment_full, or the folder of --out.

Expected
    Default, mean and standard deviation over seeds 0, 1, 2 (reward is from -4 to 4):

                         gold reward   KL to reference   share of clean gain   malformed
        reference               0.00                 0                     0      2%
        DPO, no flips    0.98 ± 0.03       0.64 ± 0.02           1.00              2%
        DPO, 40%         0.10 ± 0.01       0.03 ± 0.01           0.10 ± 0.01       2%
        rDPO, 40%        0.77 ± 0.04       0.78 ± 0.11           0.78 ± 0.06       2%
        forward, 40%     1.07 ± 0.19       2.42 ± 0.53           1.09 ± 0.18       2%

    Time: 5.8 and 7.4 minutes in two runs on two cores (jax 0.10.2, CPU).  The corrected
    losses have a higher KL than the clean run: rDPO slightly, and forward DPO almost
    four times as high.  Part of DPO's loss is only a smaller margin scale: its final
    accuracy on clean held-out pairs equals that of forward DPO (0.67; rDPO 0.72, clean
    0.78: `training.png`), but its margin is an eighth of the clean run's.

Protocol
    World: `sentiment_world.py`, a grammar of reviews with an exact gold reward.
    Reference: a Llama model with 0.23 M parameters, trained from scratch on 20,000
    reviews.
    Pairs: for each seed, 16,384 new pairs of samples from the reference at temperature
    1.
    Labels: Bradley-Terry draws from the gold reward, P = s(2 (r_a - r_b)), then each
    flipped with the known rate.  With hard labels for the better review, DPO's optimum
    would be at infinity, and results would depend only on when training stops.  With
    draws, DPO on clean labels and beta 1 has a known optimum, ref(y|x) exp(2 r(x, y)) /
    Z(x), which is the end of the line "best possible" in the report.
    Beta is 1 instead of 0.1, because noise matters only once margins reach logit P,
    here at most 0.4.  With a small beta or few steps, noisy DPO looks as good as the
    other losses.
    Training: one pass over the pairs (no pair is repeated, so no label is memorized),
    256 steps of 64 pairs, with the same pairs in the same order for every arm.
    Optimizer: the same momentum with steps of constant length for all arms.  Adam's
    normalization gives each weight the same step size whether its gradient is signal or
    label noise.  At 40% flips it is mostly noise, which costs rDPO most.  A large
    epsilon disables the normalization.  Then the scale of a loss would determine its
    step (rDPO's gradient is 5 times DPO's, forward DPO's a fifth), so all gradients are
    clipped to a norm below all of theirs.
    Measured on 1,920 samples of each policy: gold reward, and KL to the reference
    (exact for the next token, Monte Carlo over the prefix).  Share of clean gain: gain
    over the reference divided by that of DPO without flips with the same seed.
    World, model, beta, and optimizer were chosen with a prototype on different draws of
    reference, pairs, and labels.

Other settings (tried in a prototype; not reproducible with the commands above)
    A smaller beta compensates for DPO's shrinkage by 1 - 2 e and recovers much of its
    gain.  The corrected losses work with the beta for clean labels, which is their
    advantage.  Longer steps gain more on clean labels, but with the corrected losses
    the policy leaves the language.  rDPO is unbounded below, the forward correction has
    no gradient for pairs with large wrong margins, and neither constrains text outside
    the pairs.  Three seeds underestimate rDPO's variance: with other draws of the flips
    and the order, one of three seeds reached only a quarter of the clean gain.
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
from experiments.sentiment_report import write_results
from jaxpref import losses
from jaxpref.data import DataOptions, InjectOptions, encode_prompt, load_tokenizer
from jaxpref.errors import InputError
from jaxpref.files import write_json
from jaxpref.models import build
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.models.folder import load_params, save
from jaxpref.models.folder_config import read_architecture
from jaxpref.objectives import from_loss, sft
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.ranges import checked
from jaxpref.sampling import generate, left_pad
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

    seeds: tuple[int, ...] = (0, 1, 2)
    flip_rates: tuple[float, ...] = (0.4,)
    all_losses: bool = False
    sft_reviews: int = 20_000
    sft_steps: int = 300
    sft_batch: int = 128
    pairs: int = 16_384
    steps: int = 256
    batch: int = 64
    beta: float = 1.0
    step_length: float = 0.1
    heldout_pairs: int = 512
    evaluated_samples: int = 1920


@dataclasses.dataclass(frozen=True)
class Arm:
    """A loss and a flip rate; every arm sees the same pairs in the same order."""

    name: str
    loss: Callable
    flip_rate: float
    options: dict

    @property
    def folder(self) -> str:
        """Folder name of the arm under OUT/runs."""
        return f"{self.loss.__name__}-{round(100 * self.flip_rate)}"


def make_arms(protocol: Protocol) -> list[Arm]:
    """DPO without flips, then every loss at every flip rate."""
    beta = protocol.beta
    arms = [Arm("DPO, no flips", losses.dpo, 0.0, {"beta": beta})]
    for rate in protocol.flip_rates:
        at = f", {100 * rate:.0f}% flips"
        known = {"beta": beta, "flip_rate": rate}
        arms += [
            Arm(f"DPO{at}", losses.dpo, rate, {"beta": beta}),
            Arm(f"rDPO{at}", losses.rdpo, rate, known),
            Arm(f"forward DPO{at}", losses.forward_dpo, rate, known),
        ]
        if protocol.all_losses:
            arms += [
                Arm(f"cDPO{at}", losses.cdpo, rate, known),
                # IPO converges to a margin of (2 P(chosen wins) - 1) / (2 beta); with a
                # quarter of the beta, this is DPO's margin for nearly equal answers.
                Arm(f"IPO{at}", losses.ipo, rate, {"beta": beta / 4}),
            ]
    return arms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the experiment."""

    out: str | None = None
    """Output folder; repeating the command resumes the run in it.  Default:
    runs/noisy_sentiment, with the suffix _smoke or _full."""
    smoke: bool = False
    """A sanity check that takes a minute; its numbers mean nothing."""
    full: bool = False
    """Also cDPO, IPO, flip rates from 0.1 to 0.45, and five seeds; over an hour."""


def choose(options: Options) -> tuple[Protocol, Path, str]:
    """The protocol, the output folder, and the approximate duration."""
    if options.smoke and options.full:
        raise InputError("--smoke and --full cannot be combined")
    protocol, out, estimate = Protocol(), "runs/noisy_sentiment", "under 10 minutes"
    if options.full:
        rates = (0.1, 0.2, 0.3, 0.4, 0.45)
        protocol = Protocol(seeds=(0, 1, 2, 3, 4), flip_rates=rates, all_losses=True)
        out, estimate = f"{out}_full", "over an hour"
    if options.smoke:
        protocol = Protocol(
            seeds=(0,), sft_reviews=2000, sft_steps=40, sft_batch=64, pairs=640,
            steps=8, heldout_pairs=64, evaluated_samples=240,
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
    started = time.perf_counter()
    clock = functools.partial(say, started)
    runs = len(arms) * len(protocol.seeds)
    clock(f"{runs} preference runs; {estimate} on two cores")

    mesh = make_mesh(MeshConfig())
    reference = train_reference(protocol, out)
    clock("reference trained")
    pairs = functools.partial(write_pairs, reference=reference, mesh=mesh)
    rewards = [
        pairs(out / "world" / f"pairs-{seed}.jsonl", count=protocol.pairs, seed=seed)
        for seed in protocol.seeds
    ]
    pairs(out / "world" / "heldout.jsonl", count=protocol.heldout_pairs, seed=999)
    clock("pairs sampled")

    records, curves = [], []
    started = time.perf_counter()
    for done, (seed, arm) in enumerate((s, a) for s in protocol.seeds for a in arms):
        folder = out / "runs" / f"{arm.folder}-{seed}"
        export = run(preference_run(protocol, arm, seed, reference, out, folder))
        with jax.set_mesh(mesh):
            measured = measure(protocol, export, reference, seed=1000 + seed)
        records.append({"arm": arm.name, "seed": seed, **measured})
        lines = read_metrics(folder / "metrics.jsonl")
        curves += [{"arm": arm.name, "seed": seed, **line} for line in lines]
        left = (time.perf_counter() - started) / (done + 1) * (runs - done - 1)
        reward, kl = measured["reward"], measured["kl"]
        clock(
            f"run {done + 1} of {runs}: {arm.name}, seed {seed}: reward {reward:.2f}, "
            f"KL {kl:.2f}; about {left / 60:.1f} min left"
        )
    with jax.set_mesh(mesh):
        start = measure(protocol, reference, reference, seed=1000)
    add_kept(records, start["reward"])
    frontier = world.best_possible_curve(np.concatenate(rewards, axis=1), protocol.beta)
    write_results(
        out,
        protocol=protocol,
        reference=start,
        records=records,
        frontier=frontier,
        curves=curves,
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
    return world.read_rewards(path)


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
        new, new_lengths = generate(
            model,
            params,
            *left_pad(rows[start : start + batch], length),
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
            learning_rate=protocol.step_length / 0.1,
            max_grad_norm=0.1,
            adam_eps=1.0,
            warmup_steps=protocol.steps // 12,
        ),
    )


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


def add_kept(records: list[dict], start: float) -> None:
    """Adds `kept`: the gain over the reference divided by that of the clean run."""
    clean = {r["seed"]: r["reward"] for r in records if r["arm"] == "DPO, no flips"}
    for record in records:
        gain = clean[record["seed"]] - start
        record["kept"] = (record["reward"] - start) / gain


def _load(folder: Path):
    model = build(read_architecture(folder))
    return load_tokenizer(folder), model, load_params(folder, model)


if __name__ == "__main__":
    with entry_point():
        main(checked(tyro.cli(Options, description=__doc__)))
