"""Benchmark cases: real pairs or pairs of equal lengths, and a model to train."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxpref import data
from jaxpref.errors import InputError
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.models.folder_config import architecture_to_fields


@dataclasses.dataclass(frozen=True)
class Case:
    """Pairs of one kind."""

    name: str
    prompt_length: int
    """Maximum tokens of a prompt; longer prompts are cut at the start."""
    response_length: int
    """Maximum tokens of an answer; pairs with a longer one are left out everywhere."""
    batch_size: int = 8
    """Pairs per step."""
    micro_batch: int = 0
    """Pairs per micro-batch of a system with fixed lengths; 0 means all."""
    row_length: int = 0
    """Tokens of jaxpref's packed rows; 0: of the longest pair, -1: one pair per row.
    """


CASES = {
    # 1,024 and 2,048 tokens of prompt and answer together: the first is TRL's default.
    "hh": Case("hh", 512, 512),
    # At 16 x 2,048 positions, logits over 49,152 tokens would take 6.4 GB, and a step
    # several times that.  So a system that computes them all takes 2 pairs at a time.
    "ultrafeedback": Case("ultrafeedback", 1024, 1024, micro_batch=2),
    "fixed": Case("fixed", 64, 192, batch_size=4),
}
FIXED_MODEL = LlamaArchitecture(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1408,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
)
"""The model of the case `fixed`."""
ROPE_THETA = 1e6
"""Base of the rotary positions.  Tunix 0.1.7's Llama ignores its config and always uses
this one, so all models use it."""

Listed = list[list[list[int]]]
"""[prompt, chosen, rejected] of each pair, in tokens."""


def real_pairs(case: Case, source: str, tokenizer, count: int) -> Listed:
    """The first `count` pairs of a file in a fixed random order.

    Raises:
      InputError: if the file has fewer.
    """
    options = data.DataOptions(
        max_length=case.prompt_length + case.response_length,
        max_prompt_length=case.prompt_length,
        heldout_fraction=0.0,
        drop_empty=True,
    )
    pairs = data.make_splits(data.open_source(source), tokenizer, options).train
    order = np.random.default_rng(0).permutation(len(pairs))
    fits = pairs.completion_lengths.max(1) <= case.response_length
    kept = [index for index in order if fits[index]][:count]
    if len(kept) < count:
        raise InputError(
            f"{source}: has {len(kept)} pairs for the case {case.name}, which needs "
            f"{count}; give fewer --steps or --rounds"
        )
    parts = lambda n: [pairs.prompt(n), pairs.completion(n, 0), pairs.completion(n, 1)]
    return [[part.tolist() for part in parts(index)] for index in kept]


def random_pairs(case: Case, vocab_size: int, count: int) -> Listed:
    """Pairs of equal lengths with random tokens."""
    rng = np.random.default_rng(0)
    lengths = (case.prompt_length, case.response_length, case.response_length)
    return [
        [rng.integers(4, vocab_size, length).tolist() for length in lengths]
        for _ in range(count)
    ]


def sizes(listed: Listed) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of prompts [N] and of answers [N, 2]."""
    lengths = np.array([[len(part) for part in pair] for pair in listed])
    return lengths[:, 0], lengths[:, 1:]


def write_model(folder: Path, config: LlamaArchitecture) -> None:
    """Writes a Hugging Face folder with random float32 weights from a fixed seed."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: (
        rng.standard_normal(shape, np.float32) * np.float32(config.initializer_range)
    )
    D, F, K = config.hidden_size, config.intermediate_size, config.head_dim
    one, queries, keys = (
        np.ones(D, np.float32),
        config.num_heads * K,
        (config.num_kv_heads * K),
    )
    tensors = {"model.embed_tokens.weight": draw(config.vocab_size, D)}
    for layer in range(config.num_layers):
        tensors |= {
            f"model.layers.{layer}.{name}.weight": tensor
            for name, tensor in {
                "input_layernorm": one,
                "self_attn.q_proj": draw(queries, D),
                "self_attn.k_proj": draw(keys, D),
                "self_attn.v_proj": draw(keys, D),
                "self_attn.o_proj": draw(D, queries),
                "post_attention_layernorm": one,
                "mlp.gate_proj": draw(F, D),
                "mlp.up_proj": draw(F, D),
                "mlp.down_proj": draw(D, F),
            }.items()
        }
    tensors["model.norm.weight"] = one
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = draw(config.vocab_size, D)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = architecture_to_fields(config) | {"bos_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(fields, indent=2), "utf-8")
