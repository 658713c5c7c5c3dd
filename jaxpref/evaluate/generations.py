"""`jaxpref sample`: completions of prompts by a model."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from tqdm import tqdm

from jaxpref import data
from jaxpref.errors import InputError, show
from jaxpref.evaluate.unfinished import Unfinished, unfinished
from jaxpref.files import check_output, write_json
from jaxpref.models import Architecture, Model, Numerics, build
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.hub import adapter_digest
from jaxpref.models.weights import load_weights, resolve_weights
from jaxpref.runtime.memory import check_arrays
from jaxpref.runtime.mesh import MeshConfig, make_mesh, row_shards, rows_for
from jaxpref.runtime.precision import default_compute_dtype
from jaxpref.runtime.ranges import at_least
from jaxpref.sampling import generate, left_pad
from jaxpref.train.options import Dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Options of `jaxpref sample`."""

    model: str
    """Hugging Face model folder (such as OUT/export of a run) or Hub ID."""
    adapter: str | None = None
    """Folder or Hub ID of a LoRA adapter of the model, as peft writes it."""
    prompts: tuple[str, ...] = ()
    """Prompts, each in quotes.  If the model has a chat template, each is a user's
    turn, or a whole conversation as a JSON list of messages."""
    data: str | None = None
    """A file or dataset whose prompts are used instead of --prompts.  They are rendered
    as in training; texts without answers are user's turns, as in --prompts."""
    raw: bool = False
    """Do not use the chat template for texts."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """`enable_thinking` for chat templates that read it.  auto prompts as in training:
    for answers without thinking, unless --data has answers with it."""
    limit: int = 100
    """Maximum number of prompts to take from --data."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of the records in --data to ignore, even if they change what a record
    means."""
    out: str | None = None
    """JSON file for the completions, in the format of AlpacaEval (default: print them).
    `ended` is false for a completion that was cut at --max-new-tokens."""
    max_new_tokens: int = 128
    """Maximum tokens of a completion."""
    temperature: float = 1.0
    """Sampling temperature; 0 always takes the most likely token."""
    top_k: int = 0
    """Sample from the k most likely tokens only; 0 means all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together reach this probability only."""
    batch_size: int = 16
    """Prompts completed at once."""
    seed: int = 0
    """Seed of the sampling."""
    compute_dtype: Dtype | None = None
    """Dtype of matrix products and activations (default: bfloat16 on TPU and GPU,
    float32 on CPU)."""
    mesh: MeshConfig = MeshConfig()
    """Layout of the devices."""

    def __post_init__(self):
        at_least(1, self, "limit", "max_new_tokens", "batch_size")
        at_least(0, self, "top_k")
        if not (self.temperature == 0 or 1e-6 <= self.temperature < math.inf):
            raise InputError(
                f"temperature {self.temperature}: "
                "must be 0, or finite and at least 1e-6"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p}: must be above 0 and at most 1")


def run(config: SampleConfig) -> list[dict[str, Any]]:
    """Completes every prompt; prints the completions or writes them to `out`."""
    if bool(config.prompts) == bool(config.data):
        raise InputError("pass either --prompts TEXT ... or --data FILE")
    if jax.process_count() > 1:
        raise InputError("sampling runs in a single process; start it on one machine")
    if config.out is not None:
        reads = {"--data": config.data, "--model": config.model}
        reads |= {"--adapter": config.adapter}
        check_output("--out", config.out, reads)  # fail before sampling, not after
    weights = resolve_weights(config.model, config.adapter)
    folder = weights.folder
    tokenizer = data.load_tokenizer(folder)
    architecture = read_architecture(folder)
    prompts = _prompts(config, tokenizer, architecture)
    tokens = [prompt.tokens for prompt in prompts]
    _check_prompts(tokens, architecture, config)
    dtype = config.compute_dtype or default_compute_dtype()
    config = dataclasses.replace(config, compute_dtype=dtype)
    mesh = make_mesh(config.mesh)
    size = rows_for(len(prompts), config.batch_size, mesh)
    config = dataclasses.replace(config, batch_size=size)
    with jax.set_mesh(mesh):
        model = build(architecture, Numerics(compute_dtype=dtype))
        if size % row_shards(mesh) == 0:  # `generate` refuses others
            length = max(map(len, tokens)) + config.max_new_tokens
            cache = jax.eval_shape(lambda: model.empty_cache(size, length))
            check_arrays("the keys and values of a batch", cache)
        params = load_weights(weights, model)
        asked = dataclasses.asdict(config) | {"out": None, "prompts": prompts}
        if weights.adapter is not None:
            asked |= {"adapter": adapter_digest(weights.adapter)}
        kept = unfinished(config.out, asked, folder, mesh)
        outputs = sample_texts(
            model,
            params,
            tokenizer,
            tokens,
            config=config,
            kept=kept,
        )
    rows = [
        {
            "instruction": prompt.text,
            "output": sampled.text,
            "ended": sampled.ended,
            "generator": config.adapter or config.model,
        }
        for prompt, sampled in zip(prompts, outputs)
    ]
    _show(rows, config.out)
    kept.remove()
    return rows


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One completion."""

    text: str
    ended: bool
    """Whether it ends with a stop token; False if it was cut at the maximum length."""


def sample_texts(
    model: Model,
    params: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    *,
    config: SampleConfig,
    kept: Unfinished,
) -> list[Sampled]:
    """Samples one completion per prompt (token ids), in batches.

    The last batch is padded with repeated prompts, so that only one shape is compiled.
    Batches in `kept` are not sampled again, and new ones are added to it.
    """
    stops = data.stop_tokens(tokenizer)
    width = prompt_width(prompts)
    outputs: list[Sampled] = []
    with tqdm(total=len(prompts), desc="sampling") as bar:
        for start in range(0, len(prompts), config.batch_size):
            batch = prompts[start : start + config.batch_size]
            if (finished := kept.get(start, len(batch))) is not None:
                outputs += [Sampled(**completion) for completion in finished]
                bar.update(len(batch))
                continue
            drawn = sample_batch(
                model,
                params,
                batch,
                start=start,
                width=width,
                config=config,
                stop_tokens=stops,
            )
            for prompt, new in zip(batch, drawn):
                text = decode_continuation(tokenizer, prompt, new)
                outputs.append(Sampled(text, ended=bool(new) and new[-1] in stops))
            sampled_now = outputs[start : start + len(batch)]
            kept.add(start, [dataclasses.asdict(sampled) for sampled in sampled_now])
            bar.update(len(batch))
    return outputs


def prompt_width(prompts: Sequence[Sequence[int]]) -> int:
    """The width of batches of prompts: the longest one, rounded up."""
    return -(-max(map(len, prompts)) // 32) * 32


def sample_batch(
    model: Model,
    params: Any,
    batch: list[list[int]],
    *,
    start: int,
    width: int,
    config: SampleConfig,
    stop_tokens: Sequence[int],
) -> list[list[int]]:
    """The new tokens for up to `batch_size` prompts, with the stop token if any.

    Args:
      model: the model.
      params: its parameters.
      batch: token ids of each prompt.
      start: the number of the first prompt, which decides the random numbers.
      width: from `prompt_width`.
      config: how to sample.
      stop_tokens: the tokens that end an answer.
    """
    filled = batch + batch[-1:] * (config.batch_size - len(batch))
    tokens, lengths = left_pad(filled, length=width)
    key = jax.random.fold_in(jax.random.key(config.seed), start)
    drawn, counts = generate(
        model,
        params,
        tokens,
        lengths,
        key,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k or None,
        top_p=config.top_p,
        stop_tokens=stop_tokens,
    )
    rows = zip(batch, np.asarray(drawn), np.asarray(counts))
    return [row[:count].tolist() for _, row, count in rows]


def decode_continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """The text of new tokens as it continues the prompt's.

    Tokenizers decode a token differently after other tokens: alone, the first of them
    may lose its space.
    """
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    before, whole = decode(prompt), decode(prompt + new)
    return whole[len(before) :] if whole.startswith(before) else decode(new)


def _prompts(
    config: SampleConfig, tokenizer: Any, architecture: Architecture
) -> list[data.Prompt]:
    thinking = {"auto": None, "on": True, "off": False}[config.thinking]
    if thinking is not None and (config.raw or not tokenizer.chat_template):
        why = "--raw" if config.raw else f"{config.model} has no chat template"
        raise InputError(
            f"--thinking {config.thinking}: only a chat template reads it, but {why}; "
            "leave it out"
        )
    if not config.data:
        if config.ignore_fields:
            raise InputError(
                f"--ignore-fields {' '.join(config.ignore_fields)}: only records of "
                "--data have fields; leave it out"
            )
        return data.given_prompts(
            config.prompts, tokenizer, raw=config.raw, thinking=thinking
        )
    return data.read_prompts(
        data.open_source(config.data),
        tokenizer,
        limit=config.limit,
        max_prompt_length=max(2, architecture.context_length - config.max_new_tokens),
        raw=config.raw,
        thinking=thinking,
        ignore_fields=config.ignore_fields,
    )


def _check_prompts(prompts, architecture: Architecture, config: SampleConfig) -> None:
    if not prompts:
        raise InputError(f"{config.data}: contains no prompts")
    for row, prompt in enumerate(prompts, start=1):
        if len(prompt) + config.max_new_tokens > architecture.context_length:
            raise InputError(
                f"prompt {row}: its {len(prompt)} tokens and --max-new-tokens "
                f"{config.max_new_tokens} exceed the model's "
                f"{architecture.context_length} positions"
            )
        if max(prompt) >= architecture.vocab_size:
            raise InputError(
                f"prompt {row}: the tokenizer of {config.model} gives token "
                f"{max(prompt)}, but its embedding has {architecture.vocab_size} rows; "
                "use the tokenizer that belongs to the model"
            )


def _show(rows: list[dict[str, Any]], out: str | None) -> None:
    if out is None:
        for row in rows:
            show(f"> {row['instruction']}\n{row['output']}\n")
        return
    write_json(Path(out), rows)
    show(f"{len(rows)} completions written to {out}", file=sys.stderr)
