"""Learning to add from a verifier, after careless demonstrations.

Claim
    A small transformer that has learned addition from demonstrations that are mostly
    wrong gives right answers as rarely as these do.  A policy gradient with a verifier
    (GRPO, Shao et al. 2024, arXiv:2402.03300; RLOO, Ahmadian et al. 2024,
    arXiv:2402.14740; PPO, Schulman et al. 2017, arXiv:1707.06347) then raises the share
    of right answers, also to sums that were in no demonstration and in no training
    prompt.

Commands
    python -m experiments.arithmetic
    python -m experiments.arithmetic --updates 4 --out runs/arithmetic-updates
    python -m experiments.arithmetic --smoke     (sanity check)
    Repeating a command resumes its runs in OUT: runs/arithmetic,
    runs/arithmetic_smoke, or --out.

Expected
    Pass@1 on 500 held-out sums, one sample of each at temperature 1:

        demonstrations         0.35
        supervised start       0.342
        GRPO, 60 steps         0.986
        RLOO, 60 steps         0.992
        PPO, 60 steps          0.982

    Mean reward of the answers to the 32 prompts of a step (one step, 512 answers):

        step     1      5      10     15     20     30     45     60
        GRPO     0.316  0.447  0.828  0.988  0.992  0.996  0.992  0.998
        RLOO     0.316  0.447  0.828  0.986  0.984  0.994  0.994  1.000
        PPO      0.316  0.445  0.834  0.990  0.992  0.994  0.988  0.994

    PPO, which does not compare the answers to a prompt, learns as fast while its value
    head is still learning: the mean value, which starts at 0, is 0.11 at step 15, where
    the mean reward is 0.99, then 0.39 at step 30 and 0.90 at step 60 (`values/mean` in
    `metrics.jsonl`).  Only speed is compared: without a KL penalty, the divergence from
    the supervised start is not measured.

    With --updates 4, the same 60 steps learn from 15 samples instead of 60.  Pass@1 is
    0.986 (GRPO), 0.976 (RLOO), and 0.972 (PPO).

    Time: 4.3 minutes without PPO, of which 2.4 are the supervised start and about 1
    each policy gradient, on two cores of an Intel Xeon that also ran other work (jax
    0.10.2, CPU).  All of it took 12 minutes while these cores were overloaded, of which
    1.9 were PPO and 2.0 RLOO.  Of the time of GRPO, 36% is compilation, 33% gradients,
    21% sampling, 7% scoring, and 1% rewards (`timings.json`).

Protocol
    Sums of two numbers up to 99, digit by digit, the ones first; 500 of the 10,000 sums
    are held out.  40,000 demonstrations are right with probability 0.35, and otherwise
    off by one or two.  A Llama model of two layers with 110,000 parameters is trained
    on them from scratch, for 1,500 steps of 128.  The policy gradients have 60 steps of
    32 prompts with 16 answers each, learning rate 5e-4, no KL penalty, and reward 1 for
    the right answer (`rule:exact`).  PPO does not standardize advantages.  One seed.
    Changed after seeing results: in a first world (sums of numbers up to 49, digits in
    the usual order, errors of up to 9) the supervised start had not converged, and in a
    first measurement the prompts lacked the first token.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.progress import say
from experiments.sentiment_world import write_jsonl
from jaxpref import objectives
from jaxpref.data import DataOptions, given_prompts, load_tokenizer, stop_tokens
from jaxpref.errors import InputError
from jaxpref.files import write_json
from jaxpref.models import Model, Numerics, build
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.models.folder import save
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.weights import load_weights
from jaxpref.objectives import Objective
from jaxpref.online.options import SamplingOptions
from jaxpref.online.run import run as run_online
from jaxpref.rewards import RewardOptions
from jaxpref.runtime.mesh import MeshConfig, make_mesh
from jaxpref.sampling import Request, Rule, answer_all
from jaxpref.sampling.selection import sample
from jaxpref.scoring.run_weights import named_weights
from jaxpref.train import Decay, OptimizerConfig, TrainConfig, read_metrics, run

CHARACTERS = ("<pad>", "<s>", "</s>", *"0123456789+=")
LARGEST = 99
CAREFUL = 0.35
"""Share of right demonstrations."""
TOKENS = 5
"""Maximum tokens of an answer: three digits, the end, and one more."""
MESH = MeshConfig(data=-1, fsdp=1)
"""Each device has the whole model, whose vocabulary is too small to be split."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """The sizes of the experiment."""

    out: str | None = None
    """Folder of the runs and the results (default: runs/arithmetic, with the suffix
    _smoke)."""
    smoke: bool = False
    """Whether to run only a few steps."""
    demonstrations: int = 40_000
    """Careless demonstrations."""
    sft_steps: int = 1_500
    """Steps of the supervised start."""
    rl_steps: int = 60
    """Steps of each policy gradient."""
    updates: int = 1
    """Steps of a policy gradient that learn from each sample."""
    heldout: int = 500
    """Sums that are in no demonstration and no prompt."""


def problems(seed: int) -> np.ndarray:
    """All sums of two numbers in a random order, int [N, 2]."""
    a, b = np.meshgrid(np.arange(LARGEST + 1), np.arange(LARGEST + 1))
    pairs = np.stack([a.ravel(), b.ravel()], axis=1)
    return np.random.default_rng(seed).permutation(pairs)


def reversed_digits(number: int, width: int) -> str:
    """The digits of a number, the ones first: carries then need no look ahead."""
    return f"{number:0{width}}"[::-1]


def prompt_of(pair: np.ndarray) -> str:
    return f"{reversed_digits(pair[0], 2)}+{reversed_digits(pair[1], 2)}="


def answer_of(pair: np.ndarray) -> str:
    return reversed_digits(pair.sum(), 3)


def careless(rng, pair: np.ndarray) -> str:
    """The sum, which is right with probability `CAREFUL`, else off by one or two."""
    if rng.random() < CAREFUL:
        return answer_of(pair)
    right, error = pair.sum(), rng.choice([-2, -1, 1, 2])
    return reversed_digits(right + (error if right + error >= 0 else -error), 3)


def write_world(protocol: Protocol, out: Path) -> np.ndarray:
    """Writes the untrained model, demonstrations and prompts; the held-out sums."""
    order = problems(0)
    held, known = order[: protocol.heldout], order[protocol.heldout :]
    world, sizes = out / "world", out / "world" / "sizes.json"
    asked = {name: getattr(protocol, name) for name in ("heldout", "demonstrations")}
    if sizes.exists():
        if (before := json.loads(sizes.read_text())) != asked:
            raise InputError(f"{out}: was made with {before}; use another --out")
        return held
    write_tokenizer(world / "tokenizer")
    model = build(architecture())
    start = model.init(jax.random.key(0))
    save(world / "untrained", model, start, source_folder=world / "tokenizer")
    rng = np.random.default_rng(1)
    drawn = known[rng.integers(len(known), size=protocol.demonstrations)]
    rows = [{"prompt": prompt_of(x), "completion": careless(rng, x)} for x in drawn]
    write_jsonl(world / "demonstrations.jsonl", rows)
    rows = [{"prompt": prompt_of(x), "answer": answer_of(x)} for x in known]
    write_jsonl(world / "prompts.jsonl", rows)
    write_json(sizes, asked)  # the last: it says that the others are whole
    return held


def architecture() -> LlamaArchitecture:
    """A Llama model with about 110,000 parameters."""
    return LlamaArchitecture(
        vocab_size=len(CHARACTERS),
        hidden_size=64,
        intermediate_size=192,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        max_position_embeddings=16,
        initializer_range=0.05,
    )


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    write_json(folder / "config.json", ids)


def supervised(protocol: Protocol, out: Path) -> Path:
    """Trains the model on the demonstrations; returns its folder."""
    steps = protocol.sft_steps
    return run(
        TrainConfig(
            model=str(out / "world" / "untrained"),
            data=str(out / "world" / "demonstrations.jsonl"),
            out=str(out / "sft"),
            objective=objectives.sft(),
            max_steps=steps,
            batch_size=128,
            row_length="none",
            mesh=MESH,
            save_every=250,
            log_every=100,
            options=DataOptions(heldout_fraction=0.0),
            optimizer=OptimizerConfig(
                learning_rate=3e-3, warmup_steps=steps // 20, adam_b2=0.98
            ),
        )
    )


def reinforced(
    objective: Objective, protocol: Protocol, model: Path, out: Path
) -> Path:
    """Trains the model with the verifier as the reward; returns its folder."""
    steps = protocol.rl_steps
    return run_online(
        TrainConfig(
            model=str(model),
            data=str(out / "world" / "prompts.jsonl"),
            out=str(out / objective.name),
            objective=objective,
            max_steps=steps,
            batch_size=32,
            row_length="none",
            mesh=MESH,
            save_every=10,
            log_every=5,
            options=DataOptions(heldout_fraction=0.0),
            optimizer=OptimizerConfig(
                learning_rate=5e-4, warmup_steps=steps // 6, decay=Decay.CONSTANT
            ),
        ),
        SamplingOptions(
            group_size=16,
            max_new_tokens=TOKENS,
            sample_batch_size=1024,
            updates_per_sample=protocol.updates,
        ),
        RewardOptions(reward=("rule:exact",)),
    )


def accuracy(folder: Path, pairs: np.ndarray) -> float:
    """Pass@1: the share of right answers to some sums, one sample of each."""
    texts, *_ = answered(folder, [prompt_of(pair) for pair in pairs], seed=0)
    right = map(answer_of, pairs)
    return float(np.mean([a == b for a, b in zip(texts, right, strict=True)]))


def load(folder: Path) -> tuple[Model, Any]:
    """The model and parameters of a folder, or of a run's checkpoint."""
    weights = named_weights(str(folder), None)
    model = build(read_architecture(weights.folder), Numerics())
    return model, load_weights(weights, model)


def answered(
    folder: Path, prompts: Sequence[str], *, seed: int
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """An answer to each prompt: texts, tokens with those of the prompt, and lengths.

    Tokens are [N, prompt + TOKENS], padded on the right; the lengths are of answers,
    with their end.
    """
    tokenizer = load_tokenizer(named_weights(str(folder), None).folder)
    rows = [prompt.tokens for prompt in given_prompts(prompts, tokenizer)]
    with jax.set_mesh(make_mesh(MESH)):
        model, params = load(folder)
        stops = jnp.asarray(stop_tokens(tokenizer), jnp.int32)
        rule = Rule(jax.random.key(seed), sample(1.0), stops)
        requests = [Request(row, (n, 0), TOKENS) for n, row in enumerate(rows)]
        found = dict(answer_all(model, params, requests, rule, batch_size=512))
    drawn = [found[n].tokens for n in range(len(rows))]
    lengths = np.array([len(tokens) for tokens in drawn])
    whole = np.zeros((len(rows), len(rows[0]) + TOKENS), np.int32)
    for at, row, tokens in zip(whole, rows, drawn, strict=True):
        at[: len(row) + len(tokens)] = [*row, *tokens]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in drawn]
    return texts, whole, lengths


def main(protocol: Protocol) -> dict[str, Any]:
    """Runs everything and writes `results.json`."""
    out = Path(protocol.out or "runs/arithmetic" + "_smoke" * protocol.smoke)
    if protocol.smoke:
        protocol = dataclasses.replace(
            protocol, demonstrations=2_000, sft_steps=20, rl_steps=3, heldout=100
        )
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    held = write_world(protocol, out)
    start = supervised(protocol, out)
    results: dict[str, Any] = {"sft": {"heldout": accuracy(start, held)}}
    say(started, f"supervised: {results['sft']['heldout']:.3f} right")
    made = (
        objectives.grpo(beta=0.0),
        objectives.rloo(beta=0.0),
        objectives.ppo_clip(beta=0.0, whiten_advantages=False),
    )
    for objective in made:
        folder = reinforced(objective, protocol, start, out)
        lines = read_metrics(out / objective.name / "metrics.jsonl")
        curve = [[x["step"], x["rewards/mean"]] for x in lines if "rewards/mean" in x]
        found = {"heldout": accuracy(folder, held), "training": curve}
        results[objective.name] = found
        say(started, f"{objective.name}: {found['heldout']:.3f} right")
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_json(out / "results.json", results)
    return results


if __name__ == "__main__":
    main(tyro.cli(Protocol))
