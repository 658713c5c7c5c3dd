"""What a policy writes: its KL to the reference, and its mean reward.

The KL of two distributions over answers is an expectation under the policy, so it is
estimated from the policy's own answers, one for each prompt:

    KL = mean_x sum_t KL(pi(. | x, y_<t) || ref(. | x, y_<t)),    y ~ pi(. | x)

The inner KL is exact, over the whole vocabulary.  This has the expectation of the mean
of log pi(y | x) - log ref(y | x), but it is never negative and varies less.  Answers
are cut after a number of tokens; it is then the KL of the distributions of cut answers,
which is at most that of whole ones.

Source: Amini et al. 2025, "Better Estimation of the KL Divergence Between Language
Models", arXiv:2504.10637.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpref import data
from jaxpref.data.answer_text import decode_continuation
from jaxpref.data.inject import fields_read
from jaxpref.data.records import Example, parse
from jaxpref.data.tokenize import tokenize
from jaxpref.errors import InputError
from jaxpref.evaluate.generations import (
    SampleConfig,
    sampling_rule,
)
from jaxpref.models import Numerics, build
from jaxpref.models.folder import check_folder, load_params
from jaxpref.models.folder_config import (
    is_reward_model,
    read_architecture,
    read_head,
)
from jaxpref.models.hub import model_digests, resolve_folder
from jaxpref.models.logprobs import REFERENCE
from jaxpref.models.reward import check_one_reward, reward_model
from jaxpref.runtime.mesh import row_shards, share_of_rows
from jaxpref.sampling import Request, answer_all
from jaxpref.scoring.score_dataset import progress_bar
from jaxpref.scoring.scorer import Scorer
from jaxpref.scoring.twin import make_scorer
from jaxpref.train.task import Scoring


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts to be answered."""

    tokens: tuple[tuple[int, ...], ...]
    """The tokens of each, as in training."""
    examples: tuple[Example, ...]
    """The records that they come from."""
    max_new_tokens: int
    """Maximum tokens of an answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How the models compute."""

    mesh: jax.sharding.Mesh
    """The devices."""
    batch_size: int
    """Answers that are sampled and scored at once, rounded up to fit the mesh."""
    numerics: Numerics
    """Dtypes."""


def heldout_prompts(
    datasets: data.Datasets,
    options: data.DataOptions,
    *,
    count: int,
    max_new_tokens: int,
    positions: int,
) -> Prompts:
    """The first distinct held-out prompts that leave room for an answer.

    Args:
      datasets: the records of a run.
      options: how they were read.
      count: maximum number of prompts.
      max_new_tokens: maximum tokens of an answer.
      positions: the model's positions.

    Raises:
      InputError: if there is no such prompt.
    """
    heldout = datasets.splits.heldout
    _, first = np.unique(heldout.columns["prompt"], return_index=True)
    fits = heldout.context_lengths[:, 0] + max_new_tokens <= positions
    chosen = [n for n in np.sort(first) if fits[n]][:count]
    if not chosen:
        raise InputError(
            f"--kl-tokens {max_new_tokens}: no held-out prompt leaves room for so many "
            f"in the model's {positions} positions; give fewer, or --kl-prompts 0"
        )
    sides = datasets.splits.kind.sides
    sources = [
        data.open_records(name, options, sides=sides)
        for name in datasets.heldout_sources
    ]
    examples = []
    for n in chosen:
        source = sources[heldout.columns["source"][n]]
        row = int(heldout.columns["row"][n])
        place = source.location(row)
        kind = datasets.splits.kind.of_record(source[row])
        example = parse(
            source[row],
            place,
            sides=kind.sides,
            drop_empty=options.drop_empty,
            columns=kind.columns(options.named_columns),
            ignore_fields=options.ignore_fields,
            values=fields_read(options.inject),
        )
        if isinstance(example, str):
            raise InputError(f"{place}: the record has changed; keep the data as it is")
        examples.append(example)
    return Prompts(
        tokens=tuple(tuple(heldout.context(n, 0).tolist()) for n in chosen),
        examples=tuple(examples),
        max_new_tokens=max_new_tokens,
    )


@dataclasses.dataclass(frozen=True)
class RewardFolder:
    """A reward model, with its own tokenizer."""

    name: str
    """The name as the user gave it, for messages."""
    folder: Path
    tokenizer: Any
    digest: str
    """Digest of its weights and tokenizer."""


def reward_folder(name: str) -> RewardFolder:
    """The reward model in a folder.

    Raises:
      InputError: if it is not a reward model, or cannot be loaded.
    """
    folder = resolve_folder(name)
    if not is_reward_model(folder):
        raise InputError(
            f"--reward-model {name}: is not a reward model; give a folder with a "
            "sequence classifier, such as one trained with --loss bradley_terry"
        )
    check_one_reward(read_head(folder), f"--reward-model {name}")
    check_folder(folder)
    digests = model_digests(folder)
    digest = f"{digests['weights'][:32]} {digests['tokenizer'][:32]}"
    return RewardFolder(name, folder, data.load_tokenizer(folder), digest)


def measure(
    policy: Path,
    reference: Path,
    prompts: Prompts,
    scorer: RewardFolder | None,
    *,
    compute: Compute,
) -> dict[str, float]:
    """KL to the reference and mean reward of one answer to each prompt.

    The random numbers of the samples are the same for every policy.

    Args:
      policy: the policy's folder.
      reference: the reference's folder, with the same architecture and tokenizer.
      prompts: what is answered.
      scorer: the reward model, or None.
      compute: how to compute.

    Returns:
      `kl` in nats, `log_ratio` (the mean of log pi - log ref, which has the same
      expectation), and `reward` if there is a reward model, each with its standard
      error over prompts (`..._error`); `samples`; `ended`, the share of answers that
      end before they are cut; `tokens`, their mean length; and `rewarded`, the number
      of answers that the reward model can read, if there is one.

    Raises:
      InputError: if a model cannot be read.
    """
    tokenizer = data.load_tokenizer(policy)
    with jax.set_mesh(compute.mesh):
        answers = _sample(policy, tokenizer, prompts, compute)
        divergence, ratio = _divergence(policy, reference, prompts, answers, compute)
        stops = data.stop_tokens(tokenizer)
        ended = [answer[-1] in stops for answer in answers]
        found = {
            **_mean("kl", divergence),
            **_mean("log_ratio", ratio),
            "samples": len(answers),
            "ended": float(np.mean(ended)),
            "tokens": float(np.mean([len(answer) for answer in answers])),
        }
        if scorer is not None:
            texts = [
                decode_continuation(tokenizer, list(prompt), answer)
                for prompt, answer in zip(prompts.tokens, answers)
            ]
            rewards = _rewards(scorer, prompts, texts, ended, compute)
            found |= {**_mean("reward", rewards), "rewarded": len(rewards)}
    return found


def _mean(name: str, values: np.ndarray) -> dict[str, float]:
    """The mean and its standard error; NaN if there are too few values."""
    values, count = np.asarray(values, np.float64), len(values)
    error = np.std(values, ddof=1) / math.sqrt(count) if count > 1 else math.nan
    mean = np.mean(values) if count else math.nan
    return {name: float(mean), f"{name}_error": float(error)}


def _rows(count: int, compute: Compute) -> int:
    """The rows of a batch: a multiple of the parts that they are split into."""
    parts = row_shards(compute.mesh)
    return -(-min(count, compute.batch_size) // parts) * parts


def _sample(
    folder: Path, tokenizer: Any, prompts: Prompts, compute: Compute
) -> list[list[int]]:
    """One answer to each prompt: its tokens, with the stop token if there is one."""
    model = build(read_architecture(folder), compute.numerics)
    params = load_params(folder, model)
    tokens = [list(prompt) for prompt in prompts.tokens]
    size = _rows(len(tokens), compute)
    rule = sampling_rule(
        SampleConfig(model=str(folder)), model, data.stop_tokens(tokenizer)
    )
    requests = [
        Request(prompt, (number, 0), prompts.max_new_tokens)
        for number, prompt in enumerate(tokens)
    ]
    answers: list[list[int]] = [[]] * len(tokens)
    with progress_bar(len(tokens), "sampling") as bar:
        sampled = answer_all(model, params, requests, rule, batch_size=size)
        for number, answer in sampled:
            answers[number] = answer.tokens
            bar.update()
    return answers


def _divergence(
    policy: Path,
    reference: Path,
    prompts: Prompts,
    answers: Sequence[Sequence[int]],
    compute: Compute,
) -> tuple[np.ndarray, np.ndarray]:
    """KL(pi || ref) summed over positions, and log pi - log ref, of each answer."""
    model = build(read_architecture(policy), compute.numerics)
    # "kls" is the KL of the frozen model from the scored one: the policy is frozen.
    wanted = frozenset({"kls", "policy_logps", "reference_logps"})
    scores = _score(
        make_scorer(model, wanted),
        load_params(reference, model),
        {REFERENCE: load_params(policy, model)},
        _dataset(prompts.tokens, answers),
        longest=max(map(len, prompts.tokens)) + prompts.max_new_tokens,
        answer=prompts.max_new_tokens,
        compute=compute,
        title="KL to the reference",
    )
    ratio = scores["reference_logps"] - scores["policy_logps"]
    return scores["kls"][:, 0], ratio[:, 0]


def _rewards(
    scorer: RewardFolder,
    prompts: Prompts,
    texts: Sequence[str],
    ended: Sequence[bool],
    compute: Compute,
) -> np.ndarray:
    """The scores of the answers that the reward model can read."""
    model = reward_model(scorer.folder, compute.numerics)
    longest = model.architecture.context_length
    examples = [
        _answered(example, text, complete)
        for example, text, complete in zip(prompts.examples, texts, ended)
    ]
    tokenized = tokenize(
        examples,
        [f"answer {n}" for n in range(1, len(examples) + 1)],
        scorer.tokenizer,
        max_length=longest,
        whole_turns=True,
    )
    read = [tokens for tokens in tokenized if not isinstance(tokens, str)]
    if not read:
        return np.zeros(0)
    scores = _score(
        make_scorer(model, frozenset({"rewards"})),
        load_params(scorer.folder, model),
        None,
        _dataset([x.prompt for x in read], [x.completions[0] for x in read]),
        longest=64,
        answer=64,
        compute=compute,
        title="rewards",
    )
    return scores["rewards"][:, 0]


def _answered(example: Example, text: str, complete: bool) -> Example:
    """The example with this answer alone, without traces."""
    answer = {"role": "assistant", "content": text}
    return dataclasses.replace(
        example,
        completions=(answer if example.is_conversation else text,),
        ended=(complete,),
        traces=(),
    )


def _dataset(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> data.PreferenceDataset:
    builder = data.DatasetBuilder(1)
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        builder.add(prompt, [answer], id=str(number))
    return builder.build()


def _score(
    scorer: Scorer,
    params: Any,
    frozen: Any,
    answers: data.PreferenceDataset,
    *,
    longest: int,
    answer: int,
    compute: Compute,
    title: str,
) -> dict[str, np.ndarray]:
    """The scores of every answer, float32 [N, 1] by name.

    Lengths are rounded up to multiples of `longest` and `answer`, so that few shapes
    are compiled.
    """
    index, shares = share_of_rows(compute.mesh)
    layout = data.padded_layout(
        answers,
        batch_size=_rows(len(answers), compute),
        process_index=index,
        process_count=shares,
        length_multiple=-(-longest // 8) * 8,
        prediction_multiple=-(-answer // 8) * 8,
    )
    task = Scoring(scorer=scorer, mesh=compute.mesh, layout=layout)
    return task.score(task.score_step)(params, frozen, answers, title=title)
