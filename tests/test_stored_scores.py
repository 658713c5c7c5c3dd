"""Stored scores are used only if they are the reference's, whoever wrote them."""

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from jaxpref import data
from jaxpref.evaluate import features
from jaxpref.models.weights import Weights
from jaxpref.scoring import score_cache, score_tables
from jaxpref.scoring.reference import Reference
from jaxpref.scoring.score_tables import ScoredSet, score_keys

COUNT, BATCH = 12, 2
REFERENCE = Reference(
    name="model",
    weights=Weights(Path("model")),
    scores=("reference_logps",),
    numerics="",
    digest="d" * 64,
)
OTHER = {"weights and dtypes": "e" * 64}


@pytest.fixture(scope="module")
def scored() -> ScoredSet:
    rng = np.random.default_rng(0)
    builder = data.DatasetBuilder(2)
    words = lambda: rng.integers(4, 40, rng.integers(2, 9)).tolist()
    for n in range(COUNT):
        builder.add([1, *words()], [words(), words()], id=f"pair-{n}")
    return ScoredSet("train", builder.build(), ("pairs.jsonl",), np.arange(COUNT))


def true_scores(dataset) -> np.ndarray:
    """In place of a model: any function of the tokens."""
    sums = [
        [-0.1 * float(dataset.completion(n, side).sum()) for side in range(2)]
        for n in range(len(dataset))
    ]
    return np.array(sums, np.float32)


class Run:
    """One start of a run; counts the records scored, and those only checked."""

    def __init__(self, scored: ScoredSet, out: Path, expected=None):
        self.computed = self.checked = 0

        def score(params, frozen, dataset, *, title, bar):
            if title.startswith("checking"):
                self.checked += len(dataset)
            else:
                self.computed += len(dataset)
            return {"policy_logps": true_scores(dataset)}

        tables, self.digests = score_tables.score_tables(
            REFERENCE,
            [scored],
            out=out,
            load=lambda: None,
            score=score,
            batch_size=BATCH,
            layout="",
            expected=expected or {},
        )
        self.table = tables["train"]["reference_logps"]


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(score_tables, "SHARD", 4)
    monkeypatch.setattr(score_tables, "CHECKED", 1)
    monkeypatch.setenv("JAXPREF_CACHE", str(tmp_path / "cache"))


def cache_of(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "cache" / "reference").iterdir()
    return folder


def about_of(folder: Path) -> dict[str, str]:
    path = next(folder.glob("*.safetensors"))
    return score_cache._about(path.read_bytes())


def plant(folder: Path, scored: ScoredSet, change, *, records=slice(None), about=None):
    """Replaces shards by well-formed ones, as anyone could who can write there."""
    keys = score_keys(scored.dataset, REFERENCE.scores)[:, records]
    about = about_of(folder) if about is None else about
    values = np.asarray(change(true_scores(scored.dataset)[None, records]), np.float32)
    score_cache.remove(folder, keys)
    score_cache.append(folder, keys, values, about)


WRONG = {
    "all by one nat": (lambda x: x + 1, slice(None)),
    "all by a little": (lambda x: x - 0.02, slice(None)),
    "another sign": (lambda x: -x, slice(None)),
    "all equal": (lambda x: 0 * x, slice(None)),
    "huge": (lambda x: 0 * x + 3e38, slice(None)),
    "sides exchanged": (lambda x: x[..., ::-1], slice(None)),
    "records exchanged": (lambda x: x[:, ::-1], slice(None)),
    "one shard of three": (lambda x: x + 1, slice(4, 8)),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("where", ["cache", "out"])
def test_wrong_numbers_are_noticed(scored, tmp_path, caplog, name, where):
    """By a new run, from a sample; they are computed again, and gone."""
    first = Run(scored, tmp_path / "first")
    assert (first.computed, first.checked) == (COUNT, 0)
    change, records = WRONG[name]
    if where == "cache":
        out, folder = tmp_path / "second", cache_of(tmp_path)
    else:
        out = tmp_path / "first"
        folder = out / "reference" / REFERENCE.digest[:32]
    plant(folder, scored, change, records=records)
    second = Run(scored, out)
    np.testing.assert_array_equal(second.table, true_scores(scored.dataset))
    assert "reference log-probs (train): stored scores are wrong for" in caplog.text
    assert second.computed == COUNT
    assert second.digests == first.digests
    caplog.clear()
    third = Run(scored, tmp_path / "third")
    np.testing.assert_array_equal(third.table, first.table)
    assert third.computed == 0 and not caplog.text


@pytest.mark.parametrize("error", [0.0, 1e-6, -1e-4])
def test_rounding_is_not_wrong(scored, tmp_path, caplog, error):
    Run(scored, tmp_path / "first")
    plant(cache_of(tmp_path), scored, lambda x: x + error)
    second = Run(scored, tmp_path / "second")
    assert second.computed == 0 and 0 < second.checked <= COUNT // 2
    assert not caplog.text
    np.testing.assert_allclose(second.table, true_scores(scored.dataset), atol=2e-4)


@pytest.mark.parametrize("error", [0.0, 1e-6, 1.0])
def test_a_resumed_run_has_the_scores_that_it_began_with(
    scored, tmp_path, caplog, error
):
    """To the bit, without computing any."""
    out = tmp_path / "first"
    first = Run(scored, out)
    folder = out / "reference" / REFERENCE.digest[:32]
    plant(folder, scored, lambda x: x + error, records=slice(0, 1))
    resumed = Run(scored, out, first.digests)
    np.testing.assert_array_equal(resumed.table, first.table)
    assert resumed.checked == 0 and resumed.computed == (COUNT if error else 0)
    assert ("differ from those in the checkpoint" in caplog.text) == bool(error)


def test_an_extended_run_knows_the_scores_of_its_beginning(scored, tmp_path, caplog):
    """It needs more records than before; those of before must be the same."""
    out = tmp_path / "first"
    few = ScoredSet("train", scored.dataset, scored.sources, np.array([5, 0, 3]))
    more = ScoredSet("train", scored.dataset, scored.sources, np.array([5, 0, 3, 9, 1]))
    first = Run(few, out)
    assert first.digests["train"]["count"] == 3
    assert np.isnan(first.table[[1, 2, 4]]).all()
    second = Run(more, out, first.digests)
    assert (second.computed, second.checked) == (2, 0) and not caplog.text
    folder = out / "reference" / REFERENCE.digest[:32]
    plant(folder, scored, lambda x: x + 1, records=slice(3, 4))
    third = Run(more, out, first.digests)
    assert third.computed == 5 and "differ" in caplog.text
    np.testing.assert_array_equal(third.table, second.table)


@pytest.mark.parametrize("where", ["cache", "out"])
def test_wrong_numbers_of_further_records_are_noticed(scored, tmp_path, caplog, where):
    """The checkpoint of a run that is made longer does not cover them."""
    out, needed = tmp_path / "first", np.arange(COUNT)
    few = ScoredSet("train", scored.dataset, scored.sources, needed[:4])
    first = Run(few, out)
    Run(scored, tmp_path / "another")
    folder = out / "reference" / REFERENCE.digest[:32]
    about = about_of(folder)
    if where == "cache":
        folder = cache_of(tmp_path)
    plant(folder, scored, lambda x: -x, records=slice(4, COUNT), about=about)
    longer = Run(scored, out, first.digests)
    np.testing.assert_array_equal(longer.table, true_scores(scored.dataset))
    assert longer.computed == COUNT and "are wrong for" in caplog.text
    caplog.clear()
    again = Run(scored, out, longer.digests)
    assert (again.computed, again.checked) == (0, 0) and not caplog.text


@pytest.mark.parametrize("where", ["cache", "out"])
def test_shards_of_another_reference_are_named(scored, tmp_path, caplog, where):
    """As if they were copied from another folder."""
    Run(scored, tmp_path / "first")
    cache, out = cache_of(tmp_path), tmp_path / "second"
    other = tmp_path / "other"
    about = about_of(cache) | OTHER
    keys = score_keys(scored.dataset, REFERENCE.scores)
    score_cache.append(other, keys, true_scores(scored.dataset)[None] + 7, about)
    (shard,) = other.iterdir()
    folder = cache if where == "cache" else out / "reference" / REFERENCE.digest[:32]
    folder.mkdir(parents=True, exist_ok=True)
    for path in cache.iterdir():
        path.unlink()
    copied = shard.rename(folder / shard.name)
    second = Run(scored, out)
    assert second.computed == COUNT
    np.testing.assert_array_equal(second.table, true_scores(scored.dataset))
    assert f"{copied}: not used, since its scores were computed with other " in (
        caplog.text
    )
    assert "weights and dtypes" in caplog.text and copied.exists()


def sealed(folder: Path, content: bytes) -> None:
    (folder / f"{score_cache._digest(content)}.safetensors").write_bytes(content)


def without_about(folder, keys):
    sealed(folder, save({"keys": keys, "values": np.ones(len(keys), np.float32)}))


def other_dtypes(folder, keys):
    tensors = {"keys": keys, "values": np.ones(len(keys), np.float64)}
    sealed(folder, save(tensors, metadata={"about": "{}"}))


def fewer_values(folder, keys):
    tensors = {"keys": keys, "values": np.ones(len(keys) - 1, np.float32)}
    sealed(folder, save(tensors, metadata={"about": "{}"}))


def flat_keys(folder, keys):
    tensors = {"keys": keys.ravel(), "values": np.ones(keys.size, np.float32)}
    sealed(folder, save(tensors, metadata={"about": "{}"}))


def about_is_a_list(folder, keys):
    tensors = {"keys": keys, "values": np.ones(len(keys), np.float32)}
    sealed(folder, save(tensors, metadata={"about": "[1]"}))


def empty(folder, keys):
    sealed(folder, b"")


@pytest.mark.parametrize(
    "make",
    [without_about, other_dtypes, fewer_values, flat_keys, about_is_a_list, empty],
)
def test_shards_that_are_no_shards(tmp_path, caplog, make):
    """With the right name for their content."""
    keys = np.array(["a" * 32, "b" * 32])
    make(tmp_path, keys.astype(np.bytes_).view(np.uint8).reshape(2, -1))
    assert np.isnan(score_cache.read(tmp_path, keys, {})).all()
    assert "damaged; its scores will be computed again" in caplog.text


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.safetensors")  # reading it would never end
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "folder.safetensors").mkdir()
    keys = np.array(["a" * 32])
    assert np.isnan(score_cache.read(tmp_path, keys, {})).all()


@pytest.mark.parametrize("shared", ["folder", "shard"])
def test_others_could_have_written_it(tmp_path, caplog, shared):
    keys = np.array(["a" * 32])
    with contextlib.ExitStack() as stack:
        stack.callback(os.umask, os.umask(0))
        score_cache.append(tmp_path / "c", keys, np.ones(1, np.float32), {})
    (shard,) = (tmp_path / "c").iterdir()
    score_cache.read(tmp_path / "c", keys, {})
    assert not caplog.text  # even without a umask
    (tmp_path / "c" if shared == "folder" else shard).chmod(0o777)
    score_cache.read(tmp_path / "c", keys, {})
    assert "can be written by everyone" in caplog.text
    assert "stored scores" in caplog.text


def test_features_of_another_model_are_named_and_not_used(tmp_path, caplog):
    """Files whose name was changed, or whose digest begins alike."""
    ids, values = np.array(["a" * 32]), np.ones((1, 5), np.float32)
    digest, alike = "c" * 64, "c" * 16 + "d" * 48
    features._save(tmp_path, digest, ids, values)
    found = features._load(tmp_path, digest, 5)
    np.testing.assert_array_equal(found["a" * 32], values[0])
    assert features._load(tmp_path, alike, 5) == {}
    (path,) = tmp_path.iterdir()
    assert f"{path}: not used: its features are from another model" in caplog.text
