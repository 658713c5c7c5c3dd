"""Reward models against transformers' sequence classifiers on torch."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jaxpref.cli import evaluate as evaluate_command
from jaxpref.cli import train as train_command
from jaxpref.models import RewardModel
from jaxpref.models.folder import load_params, save
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.reward import Padding, padding_of
from jaxpref.models.reward_head import Head
from tests.tiny import tiny_config, tiny_params

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.parity

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
)
LENGTHS = np.array([30, 1, 7, 22])
PAD = 1


def sequences(vocab_size, left=False):
    """Random tokens that end with EOS, padded."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, vocab_size, (4, 30))
    tokens[np.arange(4), LENGTHS - 1] = 2
    tokens = np.where(np.arange(30) < LENGTHS[:, None], tokens, PAD)
    if not left:
        return tokens
    return np.stack([np.roll(row, 30 - n) for row, n in zip(tokens, LENGTHS)])


def classifier(folder):
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model, report = load(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, nothing left over
    assert model.config.num_labels == 1
    return model.eval()


def torch_scores(model, tokens):
    with torch.no_grad():
        mask = torch.tensor(tokens != PAD)
        return model(torch.tensor(tokens), attention_mask=mask).logits[:, 0].numpy()


def load(folder, *head_key):
    model = RewardModel(read_architecture(folder))
    return model, load_params(folder, model, *head_key)


@pytest.mark.parametrize("tied", [False, True])
def test_scores_agree_both_ways(tmp_path, tied):
    config = transformers.LlamaConfig(
        **SIZES, num_labels=1, pad_token_id=PAD, tie_word_embeddings=tied
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = sequences(64)
    expected = torch_scores(theirs, tokens)
    assert np.std(expected) > 0.1  # the comparison says something
    model, params = load(tmp_path / "theirs")
    ours = jax.jit(model.rewards)(params, tokens, LENGTHS)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)

    source = tmp_path / "theirs"
    save(tmp_path / "ours", model, params, source, padding=Padding("<s>", PAD))
    again = classifier(tmp_path / "ours")
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    np.testing.assert_array_equal(torch_scores(again, tokens), expected)
    left = torch_scores(again, sequences(64, left=True))
    np.testing.assert_allclose(left, expected, rtol=0, atol=1e-5)


def test_scores_agree_on_the_real_model_and_its_tokenizer(stories260k, tmp_path):
    """A new head on a real backbone; texts padded by the exported tokenizer."""
    model, params = load(stories260k, jax.random.key(0))
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories260k)
    assert tokenizer.pad_token is None
    padding = padding_of(tokenizer)
    save(tmp_path / "ours", model, params, stories260k, padding=padding)

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    texts = ["Once upon a time, there was a cat.</s>", "Tom ran.</s>", "Lily"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        theirs = classifier(tmp_path / "ours")(**inputs).logits[:, 0].numpy()
    tokens, lengths = inputs["input_ids"].numpy(), inputs["attention_mask"].sum(1)
    assert tokens[1, lengths[1] - 1] == tokenizer.eos_token_id
    model, params = load(tmp_path / "ours")
    ours = jax.jit(model.rewards)(params, tokens, lengths.numpy())
    assert np.std(theirs) > 0.01
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("with_bos", [False, True])
def test_a_trained_chat_model_is_scored_alike_by_everybody(
    stories260k, tmp_path, with_bos
):
    """Train, export, `jaxpref evaluate`, and what users of transformers call."""
    folder = tmp_path / "chat"
    shutil.copytree(stories260k, folder)
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    template = "{{ bos_token }}" * with_bos + CHATML
    path.chmod(0o644)
    path.write_text(json.dumps(fields | {"chat_template": template}))
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Tom saw a {thing}."}],
            "chosen": [{"role": "assistant", "content": "Tom was happy."}],
            "rejected": [{"role": "assistant", "content": f"The {thing} fell."}],
        }
        for thing in "cat ball cake tree hat boat dog car".split()
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"--data {pairs} --batch-size 8".split()
    train_command.command(
        [*f"--model {folder} --out {tmp_path / 'run'} --loss bradley_terry".split(),
         *"--max-steps 3 --learning-rate 1e-3 --heldout-fraction 0".split(), *common]
    )  # fmt: skip
    export = tmp_path / "run" / "export"
    evaluate_command.command(
        [*f"--model {export} --out {tmp_path / 'scores'}".split(), *common]
    )
    lines = (tmp_path / "scores" / "eval_pairs.jsonl").read_text().splitlines()
    ours = [json.loads(line) for line in lines]
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    model = classifier(export)
    for side in ("chosen", "rejected"):
        theirs = []
        for row in rows:
            inputs = tokenizer.apply_chat_template(
                [*row["prompt"], *row[side]], return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                theirs.append(model(inputs["input_ids"]).logits.item())
        found = [row[f"rewards_{side}"] for row in ours]
        assert np.std(theirs) > 0.01
        np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-4)


HEADS = {
    "ratings": Head(attributes=("helpful", "short", "kind")),
    "embedding": Head(embedding=4, temperature=0.5),
    "two layers": Head("mlp"),
    "embedding of two layers": Head("mlp", embedding=6),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_documented_reader_gives_the_same_numbers(name, tmp_path):
    page = (ROOT / "docs" / "reward_models.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    reader = {}
    exec(code, reader)
    model = RewardModel(tiny_config(), head=HEADS[name])
    params = tiny_params(model)
    save(tmp_path / "m", model, params, max_file_bytes=4000)
    tokens, at = sequences(32), (LENGTHS - 1)[:, None]
    last, _ = jax.jit(model.states_and_router)(params, tokens, at)
    ours = model.head(params, last)
    backbone, head = reader["read_reward_model"](tmp_path / "m")
    with torch.no_grad():
        # Nothing after an answer's last token affects its state.
        states = backbone.eval()(torch.tensor(tokens)).last_hidden_state
        found = head(states[torch.arange(4), torch.tensor(at[:, 0])])
    np.testing.assert_allclose(ours[:, 0], found.numpy(), rtol=0, atol=1e-5)
    if model.head.layers == "linear":
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        theirs = load(tmp_path / "m", dtype=torch.float32)
        names = tuple(theirs.config.id2label.values())
        assert len(names) == model.head.size
        assert names == model.head.attributes or not model.head.attributes
        with torch.no_grad():
            logits = theirs.score(states[torch.arange(4), torch.tensor(at[:, 0])])
        raw = logits.numpy()
        if model.head.embedding:
            raw = raw / np.linalg.norm(raw, axis=-1, keepdims=True)
        np.testing.assert_allclose(ours[:, 0], raw, rtol=0, atol=1e-5)
