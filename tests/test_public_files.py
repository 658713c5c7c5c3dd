"""Every public file trains for ten steps, with the options in docs/data.md."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jaxpref import cli
from tests.data_tokenizers import CHATML, byte_tokenizer
from tests.tiny import make_model_folder

PAGE = Path(__file__).resolve().parents[1] / "docs" / "data.md"
ROW = re.compile(r"\| `([\w.]+\.(?:json|jsonl\.gz))` \| `(--loss [^`]+)` \|")
FILES = dict(ROW.findall(PAGE.read_text("utf-8")))


def test_every_file_is_in_the_table(shared):
    assert FILES.keys() == {path.name for path in (shared / "data").glob("*.json*")}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model with a chat template, whose tokens are bytes."""
    tokenizer = byte_tokenizer(template=CHATML, eos="<|im_end|>")
    folder = make_model_folder(
        tmp_path_factory.mktemp("public") / "model",
        vocab_size=-(-len(tokenizer) // 8) * 8,
        max_position_embeddings=512,
        num_layers=1,
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_ten_steps(name, model, shared, tmp_path):
    words = (
        f"train --model {model} --data {shared}/data/{name} {FILES[name]}"
        f" --max-steps 10 --out {tmp_path}/run --batch-size 8 --max-pairs 100"
        " --max-length 256 --log-every 1"
    )
    cli.main(words.split())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [x["loss"] for x in map(json.loads, lines) if "loss" in x]
    assert len(losses) >= 10 and np.isfinite(losses).all()
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
