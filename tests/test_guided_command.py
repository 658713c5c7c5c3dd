"""`jaxpref sample --guide`: which models guide, and what is refused."""

import json
import shutil

import pytest

from jaxpref.cli import sample as sample_command
from jaxpref.errors import InputError
from tests.test_merge import make_adapter
from tests.tiny import make_model_folder

PROMPTS = ["the film was", "we liked", "the warm meal and the good"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_model_folder(folder / "model", 0)
    shutil.copytree(folder / "model", folder / "copy")
    make_model_folder(folder / "other", 1, hidden_size=24, num_layers=1)
    return folder


def sample(folder, out, *words):
    argv = ["--model", f"{folder}/model", "--max-new-tokens", "6", "--n", "2"]
    argv += ["--out", str(out), "--prompts", *PROMPTS, *words]
    sample_command.command(argv)
    return json.loads(out.read_text())


def test_a_copy_of_the_model_doubles_its_logits(folder, tmp_path):
    """Twice the logits at twice the temperature, with the same random numbers."""
    plain = sample(folder, tmp_path / "plain.json")
    half = sample(folder, tmp_path / "half.json", "--temperature", "0.5")
    texts = lambda rows: [row["output"] for row in rows]
    assert texts(plain) != texts(half)
    for name in ("copy", "model"):  # computed twice, and once
        guide = "--guide", f"{folder}/{name}:1"
        hot = sample(folder, tmp_path / "x.json", *guide, "--temperature", "2")
        assert texts(hot) == texts(plain)
        # Of the model alone.
        for one, other in zip(hot, plain, strict=True):
            assert one["logp"] == pytest.approx(other["logp"], abs=1e-4)
        assert texts(sample(folder, tmp_path / "x.json", *guide)) == texts(half)


@pytest.mark.slow
def test_guides_add_up(folder, tmp_path):
    """A guide and its opposite change nothing, and neither does a minimum of 0."""
    plain = sample(folder, tmp_path / "plain.json")
    guides = ["--guide", f"{folder}/other:1", "--guide", f"{folder}/other:-1"]
    found = sample(folder, tmp_path / "x.json", *guides)
    assert [x["output"] for x in found] == [x["output"] for x in plain]
    found = sample(folder, tmp_path / "x.json", *guides[:2])
    assert [x["output"] for x in found] != [x["output"] for x in plain]
    greedy = sample(folder, tmp_path / "greedy.json", "--temperature", "0")
    alone = ["--guide-min-p", "1"]  # only the most likely token of the model
    found = sample(folder, tmp_path / "x.json", *guides[:2], *alone)
    assert [x["output"] for x in found] == [x["output"] for x in greedy]


def test_an_adapter_and_the_model_without_it_are_guides(folder, tmp_path):
    """The model to the power of 1 - 1, times the model with the adapter."""
    make_adapter(folder / "adapter")
    adapted = sample(folder, tmp_path / "x.json", "--adapter", f"{folder}/adapter")
    guides = ["--guide", f"{folder}/adapter:1", "--guide", "base:-1"]
    found = sample(folder, tmp_path / "y.json", *guides)
    texts = lambda rows: [row["output"] for row in rows]
    assert texts(found) == texts(adapted)
    assert found[0]["logp"] != adapted[0]["logp"]
    assert texts(found) != texts(sample(folder, tmp_path / "z.json"))


def with_other_token(folder, out):
    shutil.copytree(folder / "model", out)
    text = (out / "tokenizer.json").read_text()
    (out / "tokenizer.json").write_text(text.replace('"film"', '"movie"'))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--guide", "{}/other"], "expected MODEL:WEIGHT"),
        (["--guide", "{}/other:x"], "expected MODEL:WEIGHT"),
        (["--guide", "{}/other:inf"], "expected MODEL:WEIGHT"),
        (["--guide-min-p", "0.1"], "--guide-min-p: give a --guide, too"),
        (["--guide", "{}/other:1", "--guide-min-p", "2"], "must be from 0 to 1"),
        (["--guide", "{}/other:1", "--guide-system", "a", "b"], "give one, or one for"),
        (["--guide", "{}/other:1", "--guide-system", "a"], "need a chat template"),
        (["--guide", "{}/movie:1"], "token 'film' is not in its vocabulary, but "),
    ],
)
def test_what_is_refused(folder, tmp_path, words, message):
    if "movie" in str(words) and not (folder / "movie").exists():
        with_other_token(folder, folder / "movie")
    with pytest.raises(InputError, match=message):
        sample(folder, tmp_path / "x.json", *[x.format(folder) for x in words])
