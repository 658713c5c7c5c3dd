"""`jaxpref sample`: completions of prompts by a model."""

import dataclasses
import errno
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxpref import data
from jaxpref.errors import InputError
from jaxpref.files import cannot_write, write_json
from jaxpref.models import Architecture, Model, Numerics, build
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.hub import resolve_folder, stop_tokens
from jaxpref.runtime.mesh import MeshConfig, make_mesh
from jaxpref.runtime.precision import default_compute_dtype
from jaxpref.sampling import generate, left_pad
from jaxpref.train.options import Dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Options of `jaxpref sample`."""

    model: str
    """Hugging Face model folder (such as OUT/export of a run) or Hub ID."""
    prompts: tuple[str, ...] = ()
    """Prompts, each in quotes."""
    data: str | None = None
    """A file or dataset whose prompts are used instead of --prompts."""
    limit: int = 100
    """Maximum number of prompts to take from --data."""
    out: str | None = None
    """JSON file for the completions, in the format of AlpacaEval (default: print
    them)."""
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


def run(config: SampleConfig) -> list[dict[str, str]]:
    """Completes every prompt; prints the completions or writes them to `out`."""
    if bool(config.prompts) == bool(config.data):
        raise InputError("pass either --prompts TEXT ... or --data FILE")
    if jax.process_count() > 1:
        raise InputError("sampling runs in a single process; start it on one machine")
    if config.out is not None:
        _check_writable(Path(config.out))  # fail before sampling, not after
    for name in ("limit", "max_new_tokens", "batch_size"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} {getattr(config, name)}: must be at least 1")
    folder = resolve_folder(config.model)
    tokenizer = data.load_tokenizer(folder)
    if config.data:
        texts, prompts = data.read_prompts(
            data.open_source(config.data), tokenizer, limit=config.limit
        )
    else:
        texts = list(config.prompts)
        prompts = [data.encode_prompt(tokenizer, text) for text in texts]
    architecture = read_architecture(folder)
    _check_prompts(prompts, architecture, config)
    dtype = config.compute_dtype or default_compute_dtype()
    config = dataclasses.replace(config, compute_dtype=dtype)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        model = build(architecture, Numerics(compute_dtype=dtype))
        params = load_params(folder, model)
        outputs = sample_texts(
            model,
            params,
            tokenizer,
            prompts,
            stop_tokens=stop_tokens(folder),
            config=config,
        )
    rows = [
        {"instruction": text, "output": output, "generator": config.model}
        for text, output in zip(texts, outputs)
    ]
    _show(rows, config.out)
    return rows


def sample_texts(
    model: Model,
    params: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    *,
    stop_tokens: tuple[int, ...],
    config: SampleConfig,
) -> list[str]:
    """Samples one completion per prompt (token ids), in batches.

    The last batch is padded with repeated prompts, so that only one shape is compiled.
    """
    longest = max(map(len, prompts))
    width = -(-longest // 32) * 32
    outputs = []
    with tqdm(total=len(prompts), desc="sampling") as bar:
        for start in range(0, len(prompts), config.batch_size):
            batch = prompts[start : start + config.batch_size]
            filled = batch + batch[-1:] * (config.batch_size - len(batch))
            tokens, lengths = left_pad(filled, length=width)
            key = jax.random.fold_in(jax.random.key(config.seed), start)
            drawn, drawn_lengths = generate(
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
            for ids, length in zip(np.asarray(drawn), np.asarray(drawn_lengths)):
                outputs.append(tokenizer.decode(ids[:length], skip_special_tokens=True))
            bar.update(len(batch))
    return outputs[: len(prompts)]


def _check_prompts(prompts, architecture: Architecture, config: SampleConfig) -> None:
    if not prompts:
        raise InputError(f"{config.data}: contains no prompts")
    for row, prompt in enumerate(prompts, start=1):
        if len(prompt) + config.max_new_tokens > architecture.max_position_embeddings:
            raise InputError(
                f"prompt {row}: its {len(prompt)} tokens and --max-new-tokens "
                f"{config.max_new_tokens} exceed the model's "
                f"{architecture.max_position_embeddings} positions"
            )
        if max(prompt) >= architecture.vocab_size:
            raise InputError(
                f"prompt {row}: the tokenizer of {config.model} gives token "
                f"{max(prompt)}, but its embedding has {architecture.vocab_size} rows; "
                "use the tokenizer that belongs to the model"
            )


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "not a writable file")
    except OSError as error:
        raise cannot_write(path, error) from error


def _show(rows: list[dict[str, str]], out: str | None) -> None:
    if out is None:
        for row in rows:
            print(f"> {row['instruction']}\n{row['output']}\n")
        return
    write_json(Path(out), rows)
    print(f"{len(rows)} completions written to {out}", file=sys.stderr)
