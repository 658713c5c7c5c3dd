"""Rewards from models: those of a reward model, and log-ratios of language models."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import jax
import numpy as np
from jaxtyping import Float

from jaxpref import data
from jaxpref.data import DatasetBuilder, PreferenceDataset
from jaxpref.data.options import resolved_max_length
from jaxpref.data.prompts import as_user
from jaxpref.data.records import Example
from jaxpref.data.tokenize import tokenize
from jaxpref.data.tokens import Tokens
from jaxpref.errors import InputError
from jaxpref.models import Model, Numerics, RewardModel, build
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.reward import check_one_reward
from jaxpref.models.soft_prompt_files import soft_prompt_length
from jaxpref.models.weights import (
    Weights,
    head_of,
    is_reward,
    load_weights,
    model_or_adapter,
    resolve_weights,
)
from jaxpref.rewards.answered import Answered, assistant_turn
from jaxpref.runtime.mesh import (
    MeshConfig,
    make_mesh,
    row_shards,
    rows_for,
    share_of_rows,
)
from jaxpref.runtime.precision import default_compute_dtype
from jaxpref.runtime.processes import log
from jaxpref.scoring.checks import check_finite, check_fits
from jaxpref.scoring.features import FeatureScorer
from jaxpref.scoring.score_dataset import make_score_step, score_dataset
from jaxpref.scoring.scorer import Scorer
from jaxpref.scoring.twin import make_scorer

MULTIPLE = 64
"""Of the lengths of answers and of whole texts, with `few_shapes`."""
TOKENS = 4096
"""Tokens of a packed row; a prompt with longer answers has a longer row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How models compute rewards."""

    batch_size: int = 16
    """Prompts at once, over all devices."""
    max_length: int | None = None
    """Maximum tokens of prompt and answer together; None for 1024, or the model's
    context if that is shorter."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """None for bfloat16 on TPU and GPU, and float32 on a CPU."""
    mesh: MeshConfig = MeshConfig()
    """How the devices are used."""
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Variables of the chat template for all records."""
    few_shapes: bool = False
    """Whether lengths are rounded up to multiples of `MULTIPLE`, so that scoring again
    and again compiles few programs."""


@dataclasses.dataclass(frozen=True)
class ModelReward:
    """r(x, y) of a reward model, or its predicted rating of one attribute."""

    name: str
    """As the user wrote it."""
    weights: Weights
    options: ModelOptions
    attribute: str | None = None
    """The attribute, of a model that predicts ratings."""
    params: Any = None
    """The model's parameters; None to load them in each call."""

    def loaded(self) -> "ModelReward":
        """The same reward with the model in memory, for many calls."""
        params, options = in_memory(self.weights, self.options)
        return dataclasses.replace(self, params=params, options=options)

    def __call__(self, answered: Sequence[Answered]) -> list[Float[np.ndarray, " K"]]:
        """See `Reward`."""
        asked = answered, self.options, self.name
        if self.attribute is None:
            return score(self.weights, "rewards", *asked, params=self.params)
        place = head_of(self.weights).attributes.index(self.attribute)
        found = score(self.weights, "attributes", *asked, params=self.params)
        return [x[:, place] for x in found]


@dataclasses.dataclass(frozen=True)
class LogRatio:
    """log p_strong(y | x) - log p_weak(y | x) of two language models.

    With an aligned and a base model, it is the reward by which Contrastive
    Distribution annotation ranks answers: CDR, arXiv:2411.02481.  Beta times the
    log-ratio to the reference is the implicit reward of DPO.  In nats, summed over the
    tokens of the answer.
    """

    name: str
    strong: Weights
    weak: Weights
    options: ModelOptions
    params: tuple[Any, Any] = (None, None)
    """The parameters of both models; None to load them in each call."""

    def loaded(self) -> "LogRatio":
        """The same reward with both models in memory, for many calls."""
        of_strong, options = in_memory(self.strong, self.options)
        of_weak, _ = in_memory(self.weak, self.options)
        return dataclasses.replace(self, params=(of_strong, of_weak), options=options)

    def __call__(self, answered: Sequence[Answered]) -> list[Float[np.ndarray, " K"]]:
        """See `Reward`."""
        asked = "policy_logps", answered, self.options, self.name
        of_strong, of_weak = (
            score(weights, *asked, params=params)
            for weights, params in zip((self.strong, self.weak), self.params)
        )
        return [a - b for a, b in zip(of_strong, of_weak, strict=True)]


def model_reward(word: str, options: ModelOptions) -> ModelReward:
    """The reward model in a folder, or with a Hub ID; or of an adapter and its base.

    Raises:
      InputError: if it holds another model.
    """
    weights = model_or_adapter(word)
    if not is_reward(weights):
        raise InputError(
            f"--reward {word}: holds a language model; name a reward model, such as the"
            " export of a run with --loss bradley_terry, or log-ratio:STRONG:WEAK"
        )
    if attributes := head_of(weights).attributes:
        raise InputError(
            f"--reward {word}: predicts ratings of {', '.join(attributes)}; name one "
            f"of them, as in --reward attribute:{attributes[0]}:{word}"
        )
    check_one_reward(head_of(weights), f"--reward {word}")
    return ModelReward(word, weights, options)


def attribute_reward(name: str, word: str, options: ModelOptions) -> ModelReward:
    """The rating of an attribute that the reward model in a folder predicts.

    Raises:
      InputError: if it predicts none of this name.
    """
    weights, flag = model_or_adapter(word), f"--reward attribute:{name}:{word}"
    known = head_of(weights).attributes
    if name not in known:
        what = f"predicts ratings of {', '.join(known)}" if known else "predicts none"
        raise InputError(
            f"{flag}: {word} {what}; name an attribute that a model trained with "
            "--loss attribute_regression predicts"
        )
    return ModelReward(f"attribute:{name}:{word}", weights, options, name)


def log_ratio(strong: str, weak: str, options: ModelOptions) -> LogRatio:
    """The log-ratio of the language models in two folders, or with Hub IDs.

    Raises:
      InputError: if one of them is a reward model.
    """
    names = {word: resolve_weights(word, None) for word in (strong, weak)}
    for word, weights in names.items():
        if is_reward(weights):
            raise InputError(
                f"--reward log-ratio:{strong}:{weak}: {word} is a reward model; name "
                "two language models"
            )
    return LogRatio(f"log-ratio:{strong}:{weak}", names[strong], names[weak], options)


def score(
    weights: Weights,
    name: Literal["rewards", "attributes", "embeddings", "features", "policy_logps"],
    answered: Sequence[Answered],
    options: ModelOptions,
    title: str,
    *,
    allow_cut: bool = True,
    params: Any = None,
) -> list[Float[np.ndarray, "K ..."]]:
    """One of a model's scores for every answer.

    The answers to a prompt are packed into one row, so the prompt is computed once.

    Args:
      weights: the model.
      name: the score; see `scoring.scores.DESCRIPTIONS` and `scoring.features`.
      answered: the prompts and their answers.
      options: lengths, batches and devices.
      title: names the reward, for the progress bar and messages.
      allow_cut: whether to cut what exceeds the maximum length, and log how often,
        instead of giving it no score.
      params: the model's parameters, if they are loaded already.

    Returns:
      For each prompt, the score of each answer, [K], or its attributes or embedding,
      [K, n], or its features, [K, D]; NaN for an answer that has no tokens, or holds a
      stop token before its end.

    Raises:
      InputError: if the data does not fit the model, or a score is not finite.
    """
    architecture = read_architecture(weights.folder)
    tokenizer = data.load_tokenizer(weights.folder, options.template)
    before = soft_prompt_length(weights.adapter)
    limit = resolved_max_length(
        data.DataOptions(max_length=options.max_length),
        architecture.context_length - before,
    )
    examples = [as_sampled(x, tokenizer) for x in answered]
    places = [x.place for x in answered]
    is_reward = name != "policy_logps"
    cut: set[str] = set()

    def read(some: Sequence[Example], where: Sequence[str]) -> list[Tokens | str]:
        found = tokenize(
            some, where, tokenizer, max_length=limit, whole_turns=is_reward
        )
        short = [not isinstance(x, str) and _is_cut(x) for x in found]
        cut.update(place for place, is_cut in zip(where, short) if is_cut)
        if allow_cut:
            return found
        return ["cut" if is_cut else x for x, is_cut in zip(found, short)]

    dataset, sides = _dataset(examples, places, read)
    if cut:
        log(f"{title}: {len(cut):,} prompts or their answers exceed {limit} tokens")
    tail = {
        "attributes": lambda: (head_of(weights).size,),
        "embeddings": lambda: (head_of(weights).size,),
        "features": lambda: (architecture.hidden_size,),
    }.get(name, tuple)()
    scores = [np.full((len(x.completions), *tail), np.nan) for x in examples]
    if not len(dataset):
        return scores
    dataset = dataset.prefixed(before)
    check_fits([title], dataset, str(weights.folder), architecture)
    mesh = make_mesh(options.mesh)
    with jax.set_mesh(mesh):
        model = model_of(weights, options)
        layout = _layout(dataset, options, mesh)
        found = score_dataset(
            _score_step(_scorer(model, name)),
            load_weights(weights, model) if params is None else params,
            None,
            dataset,
            eval_batches=layout.eval_batches,
            mesh=mesh,
            title=title,
        )[name]
    present = dataset.completion_lengths > 0
    finite = np.isfinite(found).reshape(*present.shape, -1).all(-1)
    checked = np.where(present & ~finite, np.nan, 0)
    check_finite([title], dataset, str(weights.folder), checked)
    for n, own in enumerate(sides):
        scores[int(dataset.columns["row"][n])][own] = found[n, : len(own)]
    return scores


def _layout(
    dataset: PreferenceDataset, options: ModelOptions, mesh: jax.sharding.Mesh
) -> data.Layout:
    """Packed rows, or padded ones of few lengths; this process's share of them."""
    index, count = share_of_rows(mesh)
    shared: Any = {
        "batch_size": rows_for(len(dataset), options.batch_size, mesh),
        "process_index": index,
        "process_count": count,
    }
    if options.few_shapes:
        sizes = {"length_multiple": MULTIPLE, "prediction_multiple": MULTIPLE}
        return data.padded_layout(dataset, **sizes, **shared)
    return data.packed_layout(
        dataset,
        order=data.in_order(dataset),
        shards=row_shards(mesh),
        tokens_per_device=TOKENS,
        **shared,
    )


def in_memory(weights: Weights, options: ModelOptions) -> tuple[Any, ModelOptions]:
    """The parameters of a model, and options for many calls."""
    with jax.set_mesh(make_mesh(options.mesh)):
        params = load_weights(weights, model_of(weights, options))
    return params, dataclasses.replace(options, few_shapes=True)


# Programs for equal scorers are compiled once.
_score_step = functools.cache(make_score_step)


def model_of(weights: Weights, options: ModelOptions) -> Model | RewardModel:
    """The model whose parameters `weights` are, which may be a reward model."""
    dtype = options.compute_dtype or default_compute_dtype()
    numerics = Numerics(compute_dtype=dtype)
    architecture = read_architecture(weights.folder)
    if is_reward(weights):
        return RewardModel(architecture, numerics, head_of(weights))
    return build(architecture, numerics)


def _scorer(model: Model | RewardModel, name: str) -> Scorer | FeatureScorer:
    if name == "features":
        return FeatureScorer(cast(RewardModel, model))
    return make_scorer(model, frozenset({name}))


def _is_cut(tokens: Tokens) -> bool:
    """Whether the prompt or an answer was cut to the maximum length."""
    return tokens.prompt_cut or tokens.turns_dropped or tokens.completions_cut > 0


def as_sampled(answered: Answered, tokenizer: Any) -> Example:
    """The example, as turns if that is how its answers were sampled."""
    example = answered.example
    turns = as_user(example, tokenizer) if answered.as_user else example
    if example.is_conversation or not turns.is_conversation:
        return example
    return dataclasses.replace(
        turns, completions=tuple(map(assistant_turn, example.completions))
    )


def _dataset(
    examples: Sequence[Example], places: Sequence[str], read: Any
) -> tuple[PreferenceDataset, list[list[int]]]:
    """The tokens of all answers; for each entry, which answers of its prompt it has.

    An entry has as many answers of a prompt as fit into a row.
    """
    builder, sides = DatasetBuilder(None), []
    for row, (example, tokens) in enumerate(zip(examples, read(examples, places))):
        whole = [(tokens, range(len(example.completions)))]
        if isinstance(tokens, str):  # one of the answers cannot be used
            alone = [example.alone(k) for k in range(len(example.completions))]
            found = read(alone, [places[row]] * len(alone))
            whole = [(x, [k]) for k, x in enumerate(found) if not isinstance(x, str)]
        for some, numbers in whole:
            for part in _parts(some):
                own = some.side_prompts and [some.side_prompts[k] for k in part]
                builder.add(
                    some.prompt,
                    [some.completions[k] for k in part],
                    side_prompts=own,
                    id=f"{row}-{numbers[part[0]]}",
                    columns={"row": row},
                )
                sides.append([numbers[k] for k in part])
    return builder.build(), sides


def _parts(tokens: Tokens) -> Iterator[list[int]]:
    """The answers in groups that fit into `TOKENS` with their prompt, at least one."""
    part, size = [], len(tokens.prompt)
    for k, completion in enumerate(tokens.completions):
        more = len(completion)
        if tokens.side_prompts:
            more += len(tokens.side_prompts[k])
        if part and size + more > TOKENS:
            yield part
            part, size = [], len(tokens.prompt)
        part, size = [*part, k], size + more
    yield part
