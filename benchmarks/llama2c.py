"""A model of Karpathy's llama2.c, converted to a Hugging Face folder.

The weights are float32 arrays without names; the tokenizer lists the pieces of a
SentencePiece model with their scores.
"""

import json
import struct

import numpy as np
from safetensors.numpy import save

SPECIAL = ("<unk>", "<s>", "</s>")
SPACE = "▁"


def to_files(weights: bytes, tokenizer: bytes) -> dict[str, bytes]:
    """The files of a Hugging Face folder.

    Args:
      weights: a file such as stories260K.bin, of the first version of the format.
      tokenizer: a file such as tok512.bin.
    """
    header = struct.unpack_from("7i", weights)
    width, inner, layers, heads, kv_heads, vocab_size, positions = header
    tensors = read_tensors(weights, header)
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        **ends,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": inner,
        "max_position_embeddings": positions,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "head_dim": width // heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": vocab_size,
        "initializer_range": 0.02,
    }
    # llama2.c's sampler also ends at BOS, which begins the next story.
    generation = ends | {"eos_token_id": [1, 2]}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
    }
    texts = {
        "config.json": config,
        "generation_config.json": generation,
        "tokenizer.json": make_tokenizer(*read_pieces(tokenizer, vocab_size)),
        "tokenizer_config.json": tokenizer_config,
    }
    files = {name: json.dumps(x, indent=2).encode() for name, x in texts.items()}
    return files | {"model.safetensors": save(tensors, {"format": "pt"})}


def read_tensors(weights: bytes, header: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The tensors by their names in a Hugging Face folder."""
    width, inner, layers, heads, kv_heads, vocab_size, _ = header
    keys = width // heads * kv_heads
    place = struct.calcsize("7i")

    def read(*shape):
        nonlocal place
        count = int(np.prod(shape))
        found = np.frombuffer(weights, "<f4", count, place).reshape(shape)
        place += found.nbytes
        return found

    tensors = {"model.embed_tokens.weight": read(vocab_size, width)}
    for name, *shape in (
        ("input_layernorm", width),
        ("self_attn.q_proj", width, width),
        ("self_attn.k_proj", keys, width),
        ("self_attn.v_proj", keys, width),
        ("self_attn.o_proj", width, width),
        ("post_attention_layernorm", width),
        ("mlp.gate_proj", inner, width),
        ("mlp.down_proj", width, inner),
        ("mlp.up_proj", inner, width),
    ):
        count = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
        for layer, tensor in enumerate(read(layers, *shape)):
            tensor = tensor if count is None else halves(tensor, count)
            tensors[f"model.layers.{layer}.{name}.weight"] = tensor
    return tensors | {"model.norm.weight": read(width)}


def halves(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head: rotated pairs from neighbors to halves."""
    rows, columns = matrix.shape
    pairs = matrix.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def read_pieces(content: bytes, vocab_size: int) -> tuple[list[str], list[float]]:
    """The pieces of a tokenizer, by id, and their scores."""
    place, pieces, scores = struct.calcsize("i"), [], []
    for _ in range(vocab_size):
        score, size = struct.unpack_from("fi", content, place)
        place += struct.calcsize("fi")
        pieces.append(content[place : place + size].decode())
        scores.append(score)
        place += size
    pieces = [piece.replace(" ", SPACE) for piece in pieces]
    pieces[: len(SPECIAL)] = SPECIAL  # llama2.c writes some with line breaks
    return pieces, scores


def make_tokenizer(pieces: list[str], scores: list[float]) -> dict:
    """`tokenizer.json`: merges of two pieces into a third, the best piece first."""
    numbers = {piece: n for n, piece in enumerate(pieces)}
    merges = []
    for piece, score in zip(pieces, scores):
        splits = ((piece[:n], piece[n:]) for n in range(1, len(piece)))
        known = [(a, b) for a, b in splits if a in numbers and b in numbers]
        known.sort(key=lambda pair: (numbers[pair[0]], numbers[pair[1]]))
        merges += [(score, pair) for pair in known]
    merges.sort(key=lambda entry: -entry[0])
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    part = lambda name: {"Sequence": {"id": name, "type_id": 0}}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, token in enumerate(SPECIAL)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, part("A")],
            "pair": [start, part("A"), start, part("B")],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": numbers,
            "merges": [list(pair) for _, pair in merges],
        },
    }
