"""An interrupted `jaxpref sample` keeps what it has sampled, and resumes."""

import dataclasses
import functools
import os
import stat

import jax
import numpy as np
import pytest

from jaxpref import data
from jaxpref.cli.main import _resumes
from jaxpref.errors import InputError
from jaxpref.evaluate import draw, generations, guides, unfinished
from jaxpref.evaluate.generations import SampleConfig
from jaxpref.runtime.mesh import MeshConfig, make_mesh
from jaxpref.sampling import Answer
from tests.tiny import WORDS, make_model_folder

PROMPTS = tuple(WORDS[:7])
CACHED = functools.cache(data.load_tokenizer)


def load_tokenizer(folder, options):
    assert not options
    return CACHED(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def sampler(monkeypatch):
    """Draws tokens that depend on prompts, numbers and key alone, last ones first."""
    monkeypatch.setattr(guides, "load_weights", lambda *_: None)
    monkeypatch.setattr(data, "load_tokenizer", load_tokenizer)

    class Sampler:
        count = 0
        stop_before = None

        def answer_all(self, model, params, requests, rule, *, batch_size, largest):
            for index in reversed(range(len(requests))):
                if self.count == self.stop_before:
                    raise KeyboardInterrupt
                self.count += 1
                asked = requests[index]
                key = np.asarray(jax.random.key_data(rule.key))
                rng = np.random.default_rng([*key, *asked.ids])
                tokens = rng.integers(4, 4 + len(WORDS), 5).tolist()
                yield index, Answer([asked.tokens[-1], *tokens], -rng.random(), True)

    sampler = Sampler()
    monkeypatch.setattr(draw, "answer_all", sampler.answer_all)
    return sampler


def config(model, folder, **options) -> SampleConfig:
    known = dict(model=str(model), prompts=PROMPTS, out=str(folder / "x.json"))
    return SampleConfig(**known | dict(batch_size=2, max_new_tokens=5) | options)


def interrupt(sampler, asked, *, after: int) -> None:
    sampler.stop_before = sampler.count + after
    with pytest.raises(KeyboardInterrupt):
        generations.run(asked)
    sampler.stop_before = None


def test_a_resumed_command_ends_like_an_undisturbed_one(model, sampler, tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    generations.run(config(model, tmp_path / "a", n=2))
    assert sampler.count == 14
    asked = config(model, tmp_path / "b", n=2)
    for after in (1, 0, 2):
        interrupt(sampler, asked, after=after)
        (kept,) = (tmp_path / "b").iterdir()
        assert kept.name == ".x.json.unfinished"
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert sampler.count == 14 + 3
    rows = generations.run(asked)
    assert sampler.count == 14 + 14  # none was sampled twice
    files = [tmp_path / name / "x.json" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [row["instruction"] for row in rows[::2]] == list(PROMPTS)
    assert [row["sample"] for row in rows] == [0, 1] * 7
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["x.json"]


def key(asked: dict, folder) -> str:
    mesh = make_mesh(MeshConfig())
    return unfinished.unfinished("x.json", asked, folder, mesh).key


def test_other_options_reuse_nothing(model, sampler, tmp_path):
    asked = config(model, tmp_path)
    interrupt(sampler, asked, after=3)
    other = config(model, tmp_path, seed=1)
    interrupt(sampler, other, after=1)  # starts at its first completion
    assert sampler.count == 4
    # Both are kept: the first command still resumes.
    generations.run(asked)
    assert sampler.count == 4 + 4


@pytest.mark.parametrize(
    "other",
    [
        dict(seed=1),
        dict(batch_size=3),
        dict(n=2),
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


LINE = b'{"key": "K", "number": 4, "completion": {"text": "a"}}'
A, B = {4: {"text": "a"}}, {4: {"text": "b"}}
KEPT = {
    "nothing": (b"", {}),
    "a completion": (LINE, A),
    "a later line counts": (LINE + b"\n" + LINE.replace(b'"a"', b'"b"'), B),
    "cut off": (LINE + b"\n" + LINE[:-9], A),
    "cut off at once": (LINE[:5], {}),
    "continued after a cut": (LINE[:-9] + b"\n" + LINE, A),
    "not UTF-8": (LINE[:-4] + b"\xff" + LINE[-3:], {}),
    "not an object": (LINE + b"\n[1]\n7\nnull", A),
    "too deep": (LINE + b"\n" + b"[" * 10**5, A),
    "of another command": (LINE.replace(b'"K"', b'"L"'), {}),
    "no completion": (LINE.replace(b'{"text": "a"}', b'"a"'), {}),
    "no place": (LINE.replace(b'"number": 4, ', b""), {}),
    "a list as the place": (LINE.replace(b"4", b"[4]"), {}),
}


@pytest.mark.parametrize("what", KEPT)
def test_what_is_read(what, tmp_path):
    content, expected = KEPT[what]
    (tmp_path / "kept").write_bytes(content)
    assert unfinished._read(tmp_path / "kept", "K") == expected


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
        kept.add(0, {"text": "a"})
    assert (tmp_path / "mine").read_text() == "important"


def test_a_file_of_another_user_is_not_read(tmp_path, monkeypatch):
    unfinished.Unfinished(tmp_path / "kept", "K", {}).add(4, A[4])
    assert unfinished._read(tmp_path / "kept", "K") == A
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o600
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(InputError, match="was not written by your"):
        unfinished._read(tmp_path / "kept", "K")


def test_nothing_is_kept_without_out(model, sampler, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = dataclasses.replace(config(model, tmp_path), out=None)
    interrupt(sampler, asked, after=2)
    generations.run(asked)
    assert sampler.count == 2 + 7 and not [*tmp_path.iterdir()]
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
