"""A tiny model folder and tiny preference data, made on the spot from seeded numpy."""

import json
from pathlib import Path

import jax
import numpy as np

WORDS = (
    "the a film book meal was is good bad great dull fine warm cold and but not very "
    "I we they liked hated saw read ate it again never always with friends food plot"
).split()


def make_tokenizer(folder: Path) -> None:
    """A word-level tokenizer with BOS and EOS, in Hugging Face form."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {
        word: n for n, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])
    }
    while len(vocab) % 8:  # divisible by every test mesh
        vocab[f"<extra_{len(vocab)}>"] = len(vocab)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)


def tiny_config(**changes):
    """Sizes that every mesh of eight devices divides."""
    from jaxpref.models.families.llama import LlamaArchitecture

    sizes = dict(
        vocab_size=-(-(len(WORDS) + 4) // 8) * 8,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        max_position_embeddings=128,
    )
    return LlamaArchitecture(**(sizes | changes))


def tiny_params(model, seed: int = 0):
    """Parameters from numpy, equal on every jax version, in the layout of the mesh."""
    rng = np.random.default_rng(seed)
    abstract = jax.eval_shape(model.init, jax.random.key(0))

    def draw(path, leaf):
        scale, mean = (
            (0.02, 1.0) if "norm" in jax.tree_util.keystr(path) else (0.2, 0.0)
        )
        values = np.asarray(rng.normal(mean, scale, leaf.shape), leaf.dtype)
        if leaf.sharding is None:
            return jax.numpy.asarray(values)
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
        return jax.device_put(values, sharding)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def make_model_folder(folder: Path, seed: int = 0, **changes) -> Path:
    """A complete Hugging Face folder; `changes` are passed to `tiny_config`."""
    from jaxpref.models import build
    from jaxpref.models.folder import save

    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder)
    model = build(tiny_config(**changes))
    save(folder, model, tiny_params(model, seed))
    return folder


def make_pairs_file(path: Path, count: int = 64, seed: int = 0) -> Path:
    """Random word pairs in the field's plain format."""
    rng = np.random.default_rng(seed)
    text = lambda low, high: " ".join(rng.choice(WORDS, rng.integers(low, high)))
    with path.open("w") as file:
        for _ in range(count):
            row = {
                "prompt": text(2, 6),
                "chosen": " " + text(3, 9),
                "rejected": " " + text(3, 9),
            }
            file.write(json.dumps(row) + "\n")
    return path


MULTIPLES = {"length_multiple": 16, "prediction_multiple": 8}
"""Lengths of padded batches that compile once, whatever the pairs."""


def padded_batches(dataset, *, seed=0, reference=None, **sizes):
    """Endless training batches, made when they are asked for."""
    from jaxpref import data  # not where only the losses are installed

    layout = data.padded_layout(dataset, **MULTIPLES | sizes)
    order = data.uniform(dataset, seed)
    return layout.batches(dataset, order, reference=reference, threads=0)
