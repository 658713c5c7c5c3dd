"""`jaxpref sample`: completions of prompts by a model."""

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref import data
from jaxpref.data.answer_text import decode_continuation
from jaxpref.errors import InputError, show
from jaxpref.evaluate import neighbors
from jaxpref.evaluate.chosen import chosen, reward_of_texts
from jaxpref.evaluate.decoding import Decoding, decoded, reward_of_answers
from jaxpref.evaluate.diverse import asked, split_all
from jaxpref.evaluate.draw import draw
from jaxpref.evaluate.guides import (
    SampledModel,
    SampledModels,
    resolve_baseline,
    resolve_models,
)
from jaxpref.evaluate.sample_options import AlignmentOptions as AlignmentOptions
from jaxpref.evaluate.sample_options import DirectionOptions as DirectionOptions
from jaxpref.evaluate.sample_options import GuideOptions as GuideOptions
from jaxpref.evaluate.sample_options import SampleConfig as SampleConfig
from jaxpref.evaluate.sampled import Sampled
from jaxpref.evaluate.unfinished import Unfinished, unfinished
from jaxpref.files import check_output, write_json, write_whole
from jaxpref.models import Model, Numerics
from jaxpref.rewards import ModelOptions, Reward, RewardOptions, combined_reward
from jaxpref.runtime import processes
from jaxpref.runtime.memory import check_arrays
from jaxpref.runtime.mesh import MeshConfig, make_mesh, row_shards, rows_for
from jaxpref.runtime.precision import default_compute_dtype
from jaxpref.sampling import Mixture, Request, Rule
from jaxpref.sampling.mixture import LanguageModel
from jaxpref.sampling.selection import select_by
from jaxpref.scoring.run_weights import named_weights

GUIDES, ALIGNMENT, REWARDS = GuideOptions(), AlignmentOptions(), RewardOptions()
DIRECTIONS = DirectionOptions()


def run(
    config: SampleConfig,
    guides: GuideOptions = GUIDES,
    alignment: AlignmentOptions = ALIGNMENT,
    rewards: RewardOptions = REWARDS,
    directions: DirectionOptions = DIRECTIONS,
) -> list[dict[str, Any]]:
    """Completes every prompt; prints the completions or writes them to `out`.

    Of several processes, each answers its share of the prompts on its own devices, and
    the first one prints or writes all completions.

    Args:
      config: the model, the prompts, and the output.
      guides: models that guide the sampling.
      alignment: how completions are drawn or chosen by their rewards.
      rewards: the rewards, for alignment that reads them.
      directions: directions in the space of rewards that the prompts ask for.

    Raises:
      InputError: for anything that the caller can fix.
    """
    alignment.check(config, rewards, directions)
    neighbors.check(directions, config, alignment, rewards)
    models = _open(config, guides, alignment)
    folder = models.model.weights.folder
    tokenizer = data.load_tokenizer(folder, config.template_options)
    prompts = _prompts(config, tokenizer, models.context_length)
    reward = None
    if alignment.reads_reward:
        reward = combined_reward(rewards, _reward_models(config))
        if alignment.decode != "sample":  # computed in every step
            reward = reward.in_memory()
    near = neighbors.neighbors(directions, rewards, len(prompts), config)
    _check_guides(config, guides, directions)
    replies, kept = _completions(
        *_as_asked(config, directions, models, tokenizer, prompts, near),
        guides,
        alignment,
        models,
        tokenizer,
        reward,
    )
    outputs = replies if near is None else neighbors.by_prompt(replies, near)
    if config.diverse:
        prompts, outputs = split_all(prompts, [own[0] for own in replies], config.n)
    candidates = None
    if alignment.pick is not None:
        texts = [[x.text for x in own] for own in outputs]
        read = reward and reward_of_texts(reward, prompts, config)
        choices = chosen(texts, alignment, read)
        if alignment.keep_candidates:
            candidates = [x.scored(own) for x, own in zip(choices, outputs)]
        outputs = [[own[x.place]] for own, x in zip(outputs, choices, strict=True)]
    numbered = config.n > 1 and alignment.pick is None
    rows = _rows(config, prompts, outputs, candidates, numbered=numbered)
    processes.together(lambda: _show(rows, config.out))
    kept.remove()
    return rows


def _as_asked(
    config: SampleConfig,
    directions: DirectionOptions,
    models: SampledModels,
    tokenizer: Any,
    prompts: list[data.Prompt],
    near: neighbors.Directions | None,
) -> tuple[SampleConfig, list[data.Prompt]]:
    """The prompts as the model reads them, and how each of these is answered."""
    longest, n = _max_prompt_length(config, models.context_length), config.n
    if near is not None:
        one = dataclasses.replace(config, n=1)
        return one, neighbors.asked(prompts, near, directions, tokenizer, longest)
    if not config.diverse:
        return config, prompts
    tokens = config.max_new_tokens * n
    one = dict(diverse=False, n=1, max_new_tokens=tokens)
    reply = dataclasses.replace(config, **one)
    return reply, [asked(x, n, tokenizer, longest) for x in prompts]


def _completions(
    config: SampleConfig,
    prompts: list[data.Prompt],
    guides: GuideOptions,
    alignment: AlignmentOptions,
    models: SampledModels,
    tokenizer: Any,
    reward: Reward | None,
) -> tuple[list[list[Sampled]], Unfinished]:
    """The completions of each prompt, and what is kept of them."""
    requests = _requests(config, prompts, models, tokenizer)
    dtype = config.compute_dtype or default_compute_dtype()
    mesh = make_mesh(config.mesh, jax.local_devices())
    share = -(-len(prompts) // jax.process_count()) * config.n * alignment.draws
    size = rows_for(share, config.batch_size, mesh)
    config = dataclasses.replace(config, compute_dtype=dtype, batch_size=size)
    text_of = lambda number, answer: decode_continuation(
        tokenizer, prompts[number].tokens, answer.tokens
    )
    of_answers = None
    if reward is not None:
        of_texts = reward_of_texts(reward, prompts, config)
        of_answers = reward_of_answers(of_texts, text_of, len(prompts), config.n)
    with jax.set_mesh(mesh):
        model = models.build(Numerics(compute_dtype=dtype))
        if size % row_shards(mesh) == 0:  # `answer_all` refuses others
            length = max(x.length for x in requests) + config.max_new_tokens
            _check_memory(model, size, length)
            if models.baseline is not None:
                _check_memory(models.baseline.build(model.numerics), size, length)
        depends = dataclasses.asdict(config) | {"out": None, "prompts": prompts}
        depends |= {"guides": dataclasses.asdict(guides), "decode": alignment.decode}
        depends |= {"models": [own.digests() for own in models.with_baseline]}
        kept = unfinished(config.out, depends, models.model.weights.folder, mesh)
        rule = sampling_rule(config, model, data.stop_tokens(tokenizer))
        answers = decoded(
            Decoding(models, model, rule, size, config.seed),
            functools.partial(draw, batch_size=size, kept=kept),
            requests,
            of_answers,
            alignment,
        )
    outputs: list[list[Sampled]] = [[] for _ in prompts]
    for n, x in enumerate(answers):
        number = n // config.n
        outputs[number].append(Sampled(text_of(number, x), x.logp, x.ended))
    return outputs, kept


def _reward_models(config: SampleConfig) -> ModelOptions:
    """How models compute rewards: over the devices of all processes."""
    dtype = config.compute_dtype
    return ModelOptions(
        batch_size=config.batch_size,
        compute_dtype=None if dtype == "float64" else dtype,
        mesh=config.mesh if jax.process_count() == 1 else MeshConfig(),
        template=config.template_options,
    )


def _check_guides(
    config: SampleConfig, guides: GuideOptions, directions: DirectionOptions
) -> None:
    """Refuses system messages, which would leave the changed prompt out."""
    rewords = {
        "--diverse": config.diverse,
        neighbors.FLAG: directions.direction_prompt is not None,
    }
    for flag, is_given in rewords.items():
        if guides.guide_system and is_given:
            raise InputError(f"--guide-system: does not go with {flag}; leave one out")


def _open(
    config: SampleConfig, guides: GuideOptions, alignment: AlignmentOptions
) -> SampledModels:
    """The models, once the command is known to be possible."""
    if bool(config.prompts) == bool(config.data):
        raise InputError("pass either --prompts TEXT ... or --data FILE")
    if (out := config.out) is not None:
        reads = {"--data": config.data, "--model": config.model}
        reads |= {"--adapter": config.adapter}
        reads |= {f"--guide {x}": x.rpartition(":")[0] for x in guides.guide}
        # Fail before sampling, not after.
        processes.together(lambda: check_output("--out", out, reads))
    weights = named_weights(config.model, config.adapter)
    models = resolve_models(config.model, weights, guides)
    baseline = resolve_baseline(alignment.baseline, models)
    return dataclasses.replace(models, baseline=baseline)


def sampling_rule(
    config: SampleConfig, model: LanguageModel, stop_tokens: Sequence[int]
) -> Rule:
    """How tokens are chosen."""
    vocabulary = model.architecture.vocab_size
    return Rule(
        key=jax.random.key(config.seed),
        select=select_by(
            config.temperature, config.top_k or None, config.top_p, vocabulary
        ),
        stop_tokens=jnp.asarray(tuple(stop_tokens), jnp.int32),
    )


def _prompts(
    config: SampleConfig, tokenizer: Any, context_length: int
) -> list[data.Prompt]:
    thinking = {"auto": None, "on": True, "off": False}[config.thinking]
    if thinking is not None and (config.raw or not tokenizer.chat_template):
        why = "--raw" if config.raw else f"{config.model} has no chat template"
        raise InputError(
            f"--thinking {config.thinking}: only a chat template reads it, but {why}; "
            "leave it out"
        )
    if not config.data:
        for name, value in config.changed().items():
            flag = f"--{name.replace('_', '-')}"
            shown = " ".join(value) if isinstance(value, tuple) else value
            raise InputError(
                f"{flag} {shown}: only records of --data have fields; leave it out"
            )
        return data.given_prompts(
            config.prompts, tokenizer, raw=config.raw, thinking=thinking
        )
    prompts, _ = data.read_prompts(
        data.open_records(config.data, config, sides=2),
        tokenizer,
        limit=config.limit,
        max_prompt_length=_max_prompt_length(config, context_length),
        raw=config.raw,
        thinking=thinking,
        ignore_fields=config.ignore_fields,
        on_bad_row=config.on_bad_row,
    )
    return prompts


def _requests(
    config: SampleConfig,
    prompts: list[data.Prompt],
    models: SampledModels,
    tokenizer: Any,
) -> list[Request]:
    """`n` requests for each prompt.

    Raises:
      InputError: if there are no prompts, or one does not fit a model.
    """
    if not prompts:
        raise InputError(f"{config.data}: contains no prompts")
    longest, requests = _max_prompt_length(config, models.context_length), []
    for number, prompt in enumerate(prompts):
        own, *of_guides = models.prompts(prompt, tokenizer, longest)
        for part, tokens in zip(models.all, (own, *of_guides), strict=True):
            _check_prompt(prompt, tokens, part, config)
        if models.baseline is not None:
            _check_prompt(prompt, own, models.baseline.model, config)
        requests += [
            Request(own, (number, n), config.max_new_tokens, tuple(of_guides))
            for n in range(config.n)
        ]
    return requests


def _check_prompt(
    prompt: data.Prompt, tokens: list[int], part: SampledModel, config: SampleConfig
):
    architecture = part.architecture
    if len(tokens) + config.max_new_tokens > architecture.context_length:
        raise InputError(
            f"{prompt.place}: its {len(tokens)} tokens and --max-new-tokens "
            f"{config.max_new_tokens} exceed the {architecture.context_length} "
            f"positions of {part.flag}"
        )
    if max(tokens) >= architecture.vocab_size:
        raise InputError(
            f"{prompt.place}: the tokenizer of {config.model} gives token "
            f"{max(tokens)}, but the embedding of {part.flag} has "
            f"{architecture.vocab_size} rows; use the tokenizer that belongs to the "
            "model"
        )


def _max_prompt_length(config: SampleConfig, context_length: int) -> int:
    return max(2, context_length - config.max_new_tokens)


def _check_memory(model: LanguageModel, size: int, length: int) -> None:
    """That the keys and values of a batch fit."""

    def cache(model: Model) -> Any:
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        return jax.eval_shape(lambda: model.empty_cache(shapes, size, length))

    models = model.models if isinstance(model, Mixture) else (model,)
    check_arrays("the keys and values of a batch", [cache(own) for own in models])


def _rows(
    config: SampleConfig,
    prompts: list[data.Prompt],
    outputs: list[list[Sampled]],
    candidates: list[list[Sampled]] | None,
    *,
    numbered: bool,
) -> list[dict[str, Any]]:
    """What is written or printed; `numbered` if prompts have several completions."""
    generator = config.adapter or config.model
    rows = []
    for place, (prompt, samples) in enumerate(zip(prompts, outputs, strict=True)):
        completions = [x.as_record() for x in samples]
        among = {}
        if candidates is not None:
            among = {"candidates": [x.as_record() for x in candidates[place]]}
        if (config.out or "").endswith(".jsonl"):
            made = {"completions": completions, "generator": generator, **among}
            rows.append({**prompt.record, **made})
            continue
        for number, completion in enumerate(completions):
            more = among | ({"sample": number} if numbered else {})
            answer = {"output": completion.pop("text"), **completion}
            row = {"instruction": prompt.text, **answer, "generator": generator, **more}
            rows.append(row)
    return rows


def _show(rows: list[dict[str, Any]], out: str | None) -> None:
    if out is None:
        for row in rows:
            show(f"> {row['instruction']}\n{row['output']}\n")
        return
    count = sum(len(row.get("completions", [row])) for row in rows)
    if out.endswith(".jsonl"):
        write_whole(out, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        write_json(Path(out), rows)
    show(f"{count} completions written to {out}", file=sys.stderr)
