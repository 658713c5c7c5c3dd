"""An interrupted `jaxpref sample` keeps what it has sampled, and resumes."""

import dataclasses
import functools
import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import data
from jaxpref.cli.main import _resumes
from jaxpref.errors import InputError
from jaxpref.evaluate import generations, unfinished
from jaxpref.evaluate.generations import SampleConfig
from jaxpref.runtime.mesh import MeshConfig, make_mesh
from tests.tiny import WORDS, make_model_folder

PROMPTS = tuple(WORDS[:7])
TOKENIZER = functools.cache(data.load_tokenizer)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def sampler(monkeypatch):
    """Draws tokens that depend on prompts and key alone, and counts the batches."""
    monkeypatch.setattr(generations, "load_weights", lambda *_: None)
    monkeypatch.setattr(data, "load_tokenizer", TOKENIZER)

    class Sampler:
        batches = 0
        stop_before = None

        def generate(self, model, params, tokens, lengths, key, **options):
            if self.batches == self.stop_before:
                raise KeyboardInterrupt
            self.batches += 1
            rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
            drawn = rng.integers(4, 4 + len(WORDS), (len(tokens), 5))
            drawn[:, 0] = tokens[:, -1]
            return jnp.asarray(drawn), jnp.full(len(tokens), 5)

    sampler = Sampler()
    monkeypatch.setattr(generations, "generate", sampler.generate)
    return sampler


def config(model, folder, **options) -> SampleConfig:
    known = dict(model=str(model), prompts=PROMPTS, out=str(folder / "x.json"))
    return SampleConfig(**known | dict(batch_size=2, max_new_tokens=5) | options)


def interrupt(sampler, asked, *, after: int) -> None:
    sampler.stop_before = sampler.batches + after
    with pytest.raises(KeyboardInterrupt):
        generations.run(asked)
    sampler.stop_before = None


def test_a_resumed_command_ends_like_an_undisturbed_one(model, sampler, tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    generations.run(config(model, tmp_path / "a"))
    assert sampler.batches == 4
    asked = config(model, tmp_path / "b")
    for after in (1, 0, 2):
        interrupt(sampler, asked, after=after)
        (kept,) = (tmp_path / "b").iterdir()
        assert kept.name == ".x.json.unfinished"
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert sampler.batches == 4 + 3
    rows = generations.run(asked)
    assert sampler.batches == 4 + 4  # none was sampled twice
    files = [tmp_path / name / "x.json" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [row["instruction"] for row in rows] == list(PROMPTS)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["x.json"]


def key(asked: dict, folder) -> str:
    mesh = make_mesh(MeshConfig())
    return unfinished.unfinished("x.json", asked, folder, mesh).key


def test_other_options_reuse_nothing(model, sampler, tmp_path):
    asked = config(model, tmp_path)
    interrupt(sampler, asked, after=3)
    other = config(model, tmp_path, seed=1)
    interrupt(sampler, other, after=1)  # starts at its first batch
    assert sampler.batches == 4
    # Both are kept: the first command still resumes.
    generations.run(asked)
    assert sampler.batches == 5


@pytest.mark.parametrize(
    "other",
    [
        dict(seed=1),
        dict(batch_size=3),
        dict(temperature=0.5),
        dict(top_k=1),
        dict(top_p=0.5),
        dict(max_new_tokens=4),
        dict(compute_dtype="bfloat16"),
        dict(prompts=[[1, 2], [4]]),
        dict(prompts=[[1, 2], [3], [3]]),
        dict(prompts=[[1], [2, 3]]),
    ],
    ids=str,
)
def test_the_key_depends_on_every_option(other, tmp_path):
    asked = dict(seed=0, batch_size=2, temperature=1.0, top_k=0, top_p=1.0)
    asked |= dict(max_new_tokens=5, compute_dtype=None, prompts=[[1, 2], [3]])
    assert key(asked, tmp_path) == key(dict(asked), tmp_path)
    assert key(asked, tmp_path) != key(asked | other, tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "model-2.safetensors", "tokenizer.json", "added.jinja"]
)
def test_the_key_depends_on_every_file_of_the_model(name, tmp_path):
    for known in ("config.json", "model-2.safetensors", "tokenizer.json"):
        (tmp_path / known).write_text(known)
    before = key({}, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert key({}, tmp_path) == before
    (tmp_path / name).write_text("other")
    assert key({}, tmp_path) != before


LINE = b'{"key": "K", "start": 4, "completions": ["a", "b"]}'
KEPT = {
    "nothing": (b"", {}),
    "a batch": (LINE, {4: ["a", "b"]}),
    "a later line counts": (
        LINE + b"\n" + LINE.replace(b'"a"', b'"c"'),
        {4: ["c", "b"]},
    ),
    "cut off": (LINE + b"\n" + LINE[:-9], {4: ["a", "b"]}),
    "cut off at once": (LINE[:5], {}),
    "continued after a cut": (LINE[:-9] + b"\n" + LINE, {4: ["a", "b"]}),
    "not UTF-8": (LINE[:-4] + b"\xff" + LINE[-3:], {}),
    "not an object": (LINE + b"\n[1]\n7\nnull", {4: ["a", "b"]}),
    "too deep": (LINE + b"\n" + b"[" * 10**5, {4: ["a", "b"]}),
    "of another command": (LINE.replace(b'"K"', b'"L"'), {}),
    "no list": (LINE.replace(b'["a", "b"]', b'"ab"'), {}),
    "no place": (LINE.replace(b'"start": 4, ', b""), {}),
    "a list as the place": (LINE.replace(b"4", b"[4]"), {}),
}


@pytest.mark.parametrize("what", KEPT)
def test_what_is_read(what, tmp_path):
    content, expected = KEPT[what]
    (tmp_path / "kept").write_bytes(content)
    assert unfinished._read(tmp_path / "kept", "K") == expected


def test_a_batch_of_another_size_is_sampled_again(tmp_path):
    kept = unfinished.Unfinished(tmp_path / "kept", "K", {4: ["a", "b"]})
    assert kept.get(4, 2) == ["a", "b"]
    assert kept.get(4, 1) is kept.get(4, 3) is kept.get(0, 2) is None


def plant_link(path):
    (path.parent / "mine").write_text("important")
    path.symlink_to(path.parent / "mine")


PLANTED = {
    "a link": plant_link,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "another file": lambda path: path.write_text("important\n"),
    "other JSON": lambda path: path.write_text('{"prompt": "x"}\n'),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_file_of_others_is_not_read(what, tmp_path):
    path = tmp_path / ".x.json.unfinished"
    PLANTED[what](path)
    with pytest.raises(InputError, match="x.json.unfinished: finished completions"):
        unfinished._read(path, "K")


def test_a_link_is_not_followed_when_writing(tmp_path):
    path = tmp_path / ".x.json.unfinished"
    kept = unfinished.Unfinished(path, "K", {})
    plant_link(path)
    with pytest.raises(InputError, match="x.json.unfinished: cannot be written"):
        kept.add(0, ["a"])
    assert (tmp_path / "mine").read_text() == "important"


def test_a_file_of_another_user_is_not_read(tmp_path, monkeypatch):
    unfinished.Unfinished(tmp_path / "kept", "K", {}).add(4, ["a", "b"])
    assert unfinished._read(tmp_path / "kept", "K") == {4: ["a", "b"]}
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o600
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(InputError, match="was not written by your"):
        unfinished._read(tmp_path / "kept", "K")


def test_nothing_is_kept_without_out(model, sampler, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = dataclasses.replace(config(model, tmp_path), out=None)
    interrupt(sampler, asked, after=2)
    generations.run(asked)
    assert sampler.batches == 2 + 4 and not [*tmp_path.iterdir()]
    assert capsys.readouterr().out.count("> ") == len(PROMPTS)


@pytest.mark.parametrize(
    ("argv", "resumes"),
    [
        (["train", "--out", "x"], True),
        (["audit"], True),
        (["sample", "--out", "x"], True),
        (["sample", "--out=x"], True),
        (["sample", "--prompts", "--outer"], False),
        (["evaluate", "--out", "x"], False),
        (["plan", "--json", "x"], False),
    ],
)
def test_what_an_interrupted_command_says(argv, resumes):
    assert _resumes(argv[0], argv[1:]) == resumes
