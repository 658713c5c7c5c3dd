"""Model folders: the complaint names the folder and the tensor."""

import json
import os

import numpy as np
import pytest

from tests.bad_input.spoiled import SHORT
from tests.tiny import make_model_folder, tiny_config


def test_no_model_folder(inputs, refuse):
    refuse(inputs.train(model=inputs.folder / "none"), "none", "no such folder")


def test_a_model_without_config(inputs, refuse):
    (inputs.model / "config.json").unlink()
    refuse(inputs.train(), str(inputs.model))


def test_a_model_with_a_damaged_config(inputs, refuse):
    (inputs.model / "config.json").write_text('{"model_type": "llama", ')
    refuse(inputs.train(), str(inputs.model))


def test_a_model_of_another_family(inputs, refuse):
    path = inputs.model / "config.json"
    fields = json.loads(path.read_text()) | {"model_type": "bert"}
    path.write_text(json.dumps(fields))
    refuse(inputs.train(), str(path), "bert")


def test_a_model_without_tokenizer(inputs, refuse):
    for path in inputs.model.glob("tokenizer*"):
        path.unlink()
    refuse(inputs.train(), str(inputs.model), "tokenizer")


def test_truncated_weights(inputs, refuse):
    path = inputs.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refuse(inputs.train(), str(path), "tensor")


def test_weights_that_are_not_safetensors(inputs, refuse):
    path = inputs.model / "model.safetensors"
    path.write_bytes(b"PK\x03\x04 a pickle in a zip file")
    refuse(inputs.train(), str(path), "not a complete safetensors file")


GATE = "model.layers.1.mlp.gate_proj.weight"


def spoiled_nan(tensors):
    tensors[GATE][3, 5] = np.nan


def spoiled_shape(tensors):
    tensors[GATE] = tensors[GATE][:, :-1]


def spoiled_missing(tensors):
    del tensors[GATE]


def spoiled_extra(tensors):
    tensors["model.layers.7.mlp.gate_proj.weight"] = tensors[GATE]


@pytest.mark.parametrize(
    ("spoil", "fragment"),
    [
        (spoiled_nan, f"{GATE} holds NaN"),
        (spoiled_shape, f"{GATE} has shape [32, 15]"),
        (spoiled_missing, f"{GATE} is missing"),
        (spoiled_extra, "model.layers.7.mlp.gate_proj.weight"),
    ],
)
def test_wrong_weights(inputs, refuse, spoil, fragment):
    tensors = inputs.tensors()
    spoil(tensors)
    inputs.write_tensors(tensors)
    refuse(inputs.train(), str(inputs.model), fragment)
    assert not (inputs.out / "config.json").exists()


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_weights_that_overflow(inputs, refuse, command):
    tensors = inputs.tensors()
    tensors["lm_head.weight"][:] = 3e38
    inputs.write_tensors(tensors)
    evaluated = ["--model", inputs.model, "--data", inputs.data, "--out", inputs.out]
    evaluate = ["evaluate", *map(str, evaluated)]
    argv = inputs.train() if command == "train" else evaluate
    refuse(argv, f"{inputs.data} row", str(inputs.model), "not finite")
    assert not (inputs.out / "metrics.json").exists()


@pytest.mark.parametrize("command", ["train", "evaluate", "sample"])
def test_a_tokenizer_with_more_tokens_than_the_embedding(inputs, refuse, command):
    # XLA would clamp the index and train on nonsense without a word.
    path = inputs.model / "tokenizer.json"
    fields = json.loads(path.read_text())
    vocabulary = fields["model"]["vocab"]
    size = tiny_config().vocab_size
    vocabulary["beyond"] = size
    path.write_text(json.dumps(fields))
    rows = inputs.data.read_text().splitlines()
    row = json.dumps({"prompt": "the beyond", "chosen": " a", "rejected": " b"})
    rows[9] = row
    inputs.data.write_text("\n".join(rows))
    evaluated = ["--model", inputs.model, "--data", inputs.data, "--out", inputs.out]
    argv = {
        "train": inputs.train(),
        "evaluate": ["evaluate", *map(str, evaluated)],
        "sample": ["sample", *map(str, evaluated[:2]), *SHORT, "--prompts", "a beyond"],
    }[command]
    refuse(argv, f"token {size}", f"{size} rows", "--prompts 1" * (command == "sample"))
    if command != "sample":
        refuse(argv, f"{inputs.data} row 10")


def test_max_length_beyond_the_positions(inputs, refuse):
    inputs.data.write_text("not read")
    refuse(inputs.train(max_length=300), "max_length 300", "128 positions", "--max-l")


def test_a_reference_of_another_size(inputs, refuse):
    other = inputs.folder / "other"
    make_model_folder(other, num_layers=1)
    refuse(inputs.train(reference=other), str(other), "the same architecture")


NAN = float("nan")
CONFIGS = {
    "layers": ({"num_hidden_layers": 10**8}, "100,000,000 layers, but the weights"),
    "more layers": ({"num_hidden_layers": 10**30}, "num_layers is 1000000000000"),
    "tokens": ({"vocab_size": 10**15}, "vocab_size is 1000000000000000"),
    "width": ({"hidden_size": 2**31 - 1}, "but config.json says [40, 2147483647]"),
    "both": ({"hidden_size": 2**31 - 1, "vocab_size": 10**9}, "a matrix of 2.1e+18"),
    "head": ({"head_dim": 10**6}, "head_dim is 1000000; the limit is 65536"),
    "no head": ({"num_attention_heads": 0}, "num_heads is 0"),
    "negative": ({"intermediate_size": -32}, "intermediate_size is -32"),
    "rope 0": ({"rope_theta": 0}, "rope_theta is 0.0; it must be >= 1"),
    "rope -1": ({"rope_theta": -10000.0}, "rope_theta is -10000.0"),
    "rope NaN": ({"rope_theta": NAN}, "rope_theta is nan"),
    "rope inf": ({"rope_theta": float("inf")}, "rope_theta is inf"),
    "rope text": ({"rope_theta": "10000"}, "rope_theta is '10000', not float"),
    "rope huge": ({"rope_theta": 10**400}, "rope_theta is out of range"),
    "rope inside": ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0.0"),
    "rope kind": ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type is"),
    "factor 0": ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor=0"),
    "factor NaN": ({"rope_scaling": {"type": "linear", "factor": NAN}}, "factor=nan"),
    "eps NaN": ({"rms_norm_eps": NAN}, "rms_norm_eps is nan"),
    "eps": ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
    "true": ({"num_hidden_layers": True}, "num_hidden_layers is True, not int"),
    "fraction": ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5, not int"),
    "family": ({"model_type": ["llama"]}, "model_type is ['llama']"),
    "families": ({"model_type": {"a": 1}}, "model_type is {'a': 1}"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_that_no_model_has(inputs, refuse, name):
    """Refused before anything is allocated."""
    changes, fragment = CONFIGS[name]
    path = inputs.model / "config.json"
    fields = json.loads(path.read_text()) | changes
    if "rope_parameters" in changes or "rope_scaling" in changes:
        fields = {k: v for k, v in fields.items() if k != "rope_theta"} | changes
    path.write_text(json.dumps(fields))
    refuse(inputs.train(), str(inputs.model), fragment)
    assert not inputs.out.joinpath("config.json").exists()


def test_architectures_that_are_no_list(inputs, refuse):
    path = inputs.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": 5}))
    given = ["--model", inputs.model, "--data", "none.jsonl", "--out", inputs.out]
    refuse(["evaluate", *map(str, given)], "none.jsonl: no such file")


PIPES = {
    "data": lambda inputs: inputs.data,
    "weights": lambda inputs: inputs.model / "model.safetensors",
    "config": lambda inputs: inputs.model / "config.json",
    "tokenizer": lambda inputs: inputs.model / "tokenizer.json",
    "options": lambda inputs: inputs.folder / "options.yaml",
    "rates": lambda inputs: inputs.folder / "rates.json",
    "held-out data": lambda inputs: inputs.folder / "heldout.jsonl",
    "compressed data": lambda inputs: inputs.folder / "heldout.jsonl.gz",
}


@pytest.mark.parametrize("what", PIPES)
def test_a_pipe_in_place_of_a_file(inputs, refuse, what):
    """Opening it would wait for a writer."""
    path = PIPES[what](inputs)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    options = {
        "options": ["--config", path],
        "rates": ["--inject.rates", path],
        "held-out data": ["--eval-data", path],
        "compressed data": ["--eval-data", path],
    }
    refuse(
        inputs.train(*options.get(what, [])),
        f"{path}: is a pipe, a socket or a device; give a regular file",
    )


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/tty", "/dev/null"])
def test_a_device_in_place_of_a_file(inputs, refuse, device):
    path = inputs.folder / "endless.jsonl"
    path.symlink_to(device)
    refuse(inputs.train("--data", path), f"{path}: is a pipe, a socket or a device")
