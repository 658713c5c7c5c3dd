"""`jaxpref sample`: completions of prompts by a model."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jaxpref import data
from jaxpref.data.answer_text import decode_continuation
from jaxpref.errors import InputError, show
from jaxpref.evaluate.unfinished import Unfinished, unfinished
from jaxpref.files import check_output, write_json, write_whole
from jaxpref.models import Architecture, Model, Numerics, build
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.hub import adapter_digest
from jaxpref.models.soft_prompt import with_placeholders
from jaxpref.models.soft_prompt_files import soft_prompt_length
from jaxpref.models.weights import is_reward, load_weights
from jaxpref.runtime import processes
from jaxpref.runtime.memory import check_arrays
from jaxpref.runtime.mesh import MeshConfig, make_mesh, row_shards, rows_for
from jaxpref.runtime.precision import default_compute_dtype
from jaxpref.runtime.ranges import at_least
from jaxpref.sampling import Request, Rule, answer_all
from jaxpref.sampling.selection import select_by
from jaxpref.scoring.run_weights import named_weights
from jaxpref.train.options import Dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(data.RecordOptions):
    """Options of `jaxpref sample`."""

    model: str
    """Hugging Face model folder (such as OUT/export of a run), OUT of a run, one of its
    checkpoints, or a Hub ID."""
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
    out: str | None = None
    """File for the completions (default: print them).  A name that ends in .jsonl gives
    a line for each prompt, with its record and its answers; any other name gives JSON
    in the format of AlpacaEval.  `logp` is the log-probability of a completion, in nats
    at temperature 1; `ended` is false if it was cut off at --max-new-tokens."""
    num_samples: int = 1
    """Number of completions of each prompt."""
    max_new_tokens: int = 128
    """Maximum tokens of a completion."""
    temperature: float = 1.0
    """Sampling temperature; 0 always takes the most likely token."""
    top_k: int = 0
    """Sample from the k most likely tokens only; 0 means all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together reach this probability only."""
    batch_size: int = 16
    """Completions sampled at once.  When one ends, the next prompt takes its place."""
    seed: int = 0
    """Seed of the sampling.  The random numbers of a token depend only on this, the
    indices of the prompt and the completion, and the token's position."""
    compute_dtype: Dtype | None = None
    """Dtype of matrix products and activations (default: bfloat16 on TPU and GPU,
    float32 on CPU)."""
    mesh: MeshConfig = MeshConfig()
    """Layout of the devices of each process."""

    def __post_init__(self):
        at_least(1, self, "limit", "max_new_tokens", "num_samples", "batch_size")
        at_least(0, self, "top_k")
        if not (self.temperature == 0 or 1e-6 <= self.temperature < math.inf):
            raise InputError(
                f"temperature {self.temperature}: "
                "must be 0, or finite and at least 1e-6"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p}: must be above 0 and at most 1")


def run(config: SampleConfig) -> list[dict[str, Any]]:
    """Completes every prompt; prints the completions or writes them to `out`.

    Of several processes, each answers its share of the prompts on its own devices, and
    the first one prints or writes all completions.
    """
    if bool(config.prompts) == bool(config.data):
        raise InputError("pass either --prompts TEXT ... or --data FILE")
    if (out := config.out) is not None:
        reads = {"--data": config.data, "--model": config.model}
        reads |= {"--adapter": config.adapter}
        # Fail before sampling, not after.
        processes.together(lambda: check_output("--out", out, reads))
    weights = named_weights(config.model, config.adapter)
    if is_reward(weights):
        raise InputError(
            f"--model {config.model}: is a reward model, which writes no text; pass a "
            "language model"
        )
    folder = weights.folder
    tokenizer = data.load_tokenizer(folder, config.template_options)
    architecture = read_architecture(folder)
    before = soft_prompt_length(weights.adapter)
    prompts = _prompts(config, tokenizer, architecture.context_length - before)
    tokens = [with_placeholders(prompt.tokens, before) for prompt in prompts]
    _check_prompts(tokens, architecture, config)
    dtype = config.compute_dtype or default_compute_dtype()
    config = dataclasses.replace(config, compute_dtype=dtype)
    mesh = make_mesh(config.mesh, jax.local_devices())
    share = range(jax.process_index(), len(prompts), jax.process_count())
    size = rows_for(len(share) * config.num_samples, config.batch_size, mesh)
    config = dataclasses.replace(config, batch_size=size)
    with jax.set_mesh(mesh):
        model = build(architecture, Numerics(compute_dtype=dtype))
        if size % row_shards(mesh) == 0:  # `answer_all` refuses others
            length = max(map(len, tokens)) + config.max_new_tokens
            shapes = jax.eval_shape(model.init, jax.random.key(0))
            cache = jax.eval_shape(lambda: model.empty_cache(shapes, size, length))
            check_arrays("the keys and values of a batch", cache)
        asked = dataclasses.asdict(config) | {"out": None, "prompts": prompts}
        if weights.adapter is not None:
            asked |= {"adapter": adapter_digest(weights.adapter)}
        if weights.saved is not None:
            asked |= {"checkpoint": weights.saved.digest}
        kept = unfinished(config.out, asked, folder, mesh)

        def sampled() -> dict[int, list[Sampled]]:
            return sample_texts(
                model,
                load_weights(weights, model),
                tokenizer,
                {number: tokens[number] for number in share},
                config=config,
                kept=kept,
                placeholders=before,
            )

        outputs = _of_all_processes(sampled)
    rows = _rows(config, prompts, [outputs[number] for number in range(len(prompts))])
    processes.together(lambda: _show(rows, config.out))
    kept.remove()
    return rows


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One completion."""

    text: str
    logp: float
    """log p(completion | prompt) in nats, of the model's own distribution."""
    ended: bool
    """Whether it ends with a stop token; False if it was cut at the maximum length."""


def sample_texts(
    model: Model,
    params: Any,
    tokenizer: Any,
    prompts: Mapping[int, list[int]],
    *,
    config: SampleConfig,
    kept: Unfinished,
    placeholders: int = 0,
) -> dict[int, list[Sampled]]:
    """Samples `num_samples` completions of each prompt (token ids), by its number.

    The first `placeholders` tokens of each prompt stand for a soft prompt.
    Completions in `kept` are not sampled again, and new ones are added to it.
    """
    count = config.num_samples
    numbers = [n * count + sample for n in prompts for sample in range(count)]
    outputs = {n: Sampled(**found) for n in numbers if (found := kept.get(n))}
    rest = [number for number in numbers if number not in outputs]
    requests = [
        Request(prompts[n // count], (n // count, n % count), config.max_new_tokens)
        for n in rest
    ]
    rule = sampling_rule(config, model, data.stop_tokens(tokenizer))
    sampled = answer_all(model, params, requests, rule, batch_size=config.batch_size)
    del params  # `answer_all` makes its own copy, and then needs no other
    with tqdm(
        total=len(numbers),
        initial=len(outputs),
        desc="sampling",
        disable=jax.process_index() > 0,
    ) as bar:
        for index, answer in sampled:
            number = rest[index]
            prompt = list(requests[index].tokens)[placeholders:]
            text = decode_continuation(tokenizer, prompt, answer.tokens)
            outputs[number] = found = Sampled(text, answer.logp, answer.ended)
            kept.add(number, dataclasses.asdict(found))
            bar.update()
    return {
        n: [outputs[n * count + sample] for sample in range(count)] for n in prompts
    }


def _of_all_processes(
    sampled: Callable[[], dict[int, list[Sampled]]],
) -> dict[int, list[Sampled]]:
    """The completions of all processes.

    Raises:
      InputError: on every process, if one of them raises it.
    """
    if jax.process_count() == 1:
        return sampled()
    try:
        mine = {n: [vars(x) for x in found] for n, found in sampled().items()}
        text = json.dumps({"completions": mine})
    except InputError as error:
        text = json.dumps({"error": str(error)})
    outputs = {}
    for found in map(json.loads, processes.gather_texts(text)):
        if "error" in found:
            raise InputError(found["error"])
        for number, completions in found["completions"].items():
            outputs[int(number)] = [Sampled(**x) for x in completions]
    return outputs


def sampling_rule(
    config: SampleConfig, model: Model, stop_tokens: Sequence[int]
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
    return data.read_prompts(
        data.open_records(config.data, config, sides=2),
        tokenizer,
        limit=config.limit,
        max_prompt_length=max(2, context_length - config.max_new_tokens),
        raw=config.raw,
        thinking=thinking,
        ignore_fields=config.ignore_fields,
        on_bad_row=config.on_bad_row,
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


def _rows(
    config: SampleConfig, prompts: list[data.Prompt], outputs: list[list[Sampled]]
) -> list[dict[str, Any]]:
    """What is written or printed."""
    generator = config.adapter or config.model
    rows = []
    for prompt, samples in zip(prompts, outputs, strict=True):
        answers = [
            {"output": x.text, "logp": x.logp, "ended": x.ended} for x in samples
        ]
        if (config.out or "").endswith(".jsonl"):
            row = {"record": prompt.record, "answers": answers, "generator": generator}
            rows.append(row)
            continue
        for number, answer in enumerate(answers):
            more = {"sample": number} if config.num_samples > 1 else {}
            row = {"instruction": prompt.text, **answer, "generator": generator, **more}
            rows.append(row)
    return rows


def _show(rows: list[dict[str, Any]], out: str | None) -> None:
    if out is None:
        for row in rows:
            show(f"> {row['instruction']}\n{row['output']}\n")
        return
    count = sum(len(row.get("answers", [row])) for row in rows)
    if out.endswith(".jsonl"):
        write_whole(out, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        write_json(Path(out), rows)
    show(f"{count} completions written to {out}", file=sys.stderr)
