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


def step_on_margins(objective, margins, state, annotators=None, *, first_pair=0):
    """One step of an objective on pairs whose log-ratio margins are given.

    The only parameter is a factor w of all margins, at w = 1.  The chosen answer's
    log-probability is the margin; all other log-probabilities are 0.

    Args:
      objective: the objective.
      margins: the margin of each pair in nats, [N]; NaN is an empty slot.
      state: the objective's state before the step.
      annotators: index of each pair's annotator; all unknown by default.
      first_pair: index of the first pair in the dataset.

    Returns:
      The gradient in w, the state after the step, and the metrics.
    """
    # Not where only the losses are installed.
    from jaxpref.data.batch import PreferenceBatch
    from jaxpref.scoring.scores import Scored
    from jaxpref.train.gradient import gradient

    shape = (1, len(margins), 1)
    blank = np.zeros((*shape, 0), np.int32)
    annotators = np.full(len(margins), -1) if annotators is None else annotators
    pairs = np.where(np.isnan(margins), -1, first_pair + np.arange(len(margins)))
    batch = PreferenceBatch(
        tokens=blank,
        lengths=np.zeros(shape, np.int32),
        predictors=blank,
        targets=blank,
        completions=blank,
        pair_index=pairs.reshape(shape),
        completion_lengths=np.ones((*shape, 2), np.int32),
        reference={"reference_logps": np.zeros((*shape, 2), np.float32)},
        is_flipped=np.zeros(shape, bool),
        annotator=np.reshape(annotators, shape),
        empty_trace=np.zeros(shape, bool),
        weights=np.ones(shape, np.float32),
    )
    batch = jax.tree.map(jax.numpy.asarray, batch)
    logps = np.stack([np.nan_to_num(margins), np.zeros(len(margins))], -1)
    logps = jax.numpy.asarray(logps.reshape(-1, 1, 2), jax.numpy.float32)
    score = lambda w, micro: Scored({"policy_logps": w * logps}, {})
    return gradient(objective, score, jax.numpy.float32(1.0), batch, state)
