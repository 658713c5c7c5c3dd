"""The reference is scored once: for all runs, whatever dies or is damaged."""

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpref import data, losses
from jaxpref.errors import InputError
from jaxpref.objectives import from_loss
from jaxpref.runtime.cache_folder import cache_folder
from jaxpref.scoring import made_by, score_cache, score_tables
from jaxpref.train import MeshConfig, TrainConfig, begin, read_metrics, run, task
from tests.tiny import make_model_folder, make_pairs_file

ROOT = Path(__file__).resolve().parents[1]
DPO = from_loss(losses.dpo, beta=0.5)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_model_folder(folder / "model")
    make_model_folder(folder / "other", seed=1)
    make_pairs_file(folder / "pairs.jsonl")
    return folder


@pytest.fixture
def shared_folder(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("JAXPREF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


@pytest.fixture
def scored(monkeypatch):
    """The number of pairs of each set that the reference scores, block by block."""
    counts, score_dataset = [], task.score_dataset

    def count(step, params, frozen, dataset, *, title, **options):
        if title.startswith("reference"):
            counts.append(len(dataset))
        return score_dataset(step, params, frozen, dataset, title=title, **options)

    monkeypatch.setattr(task, "score_dataset", count)
    return counts


class Enough(Exception):
    """The reference is scored; training would come."""


class NotCompiled:
    """In place of the train step: known only once the reference is scored."""

    def done(self):
        return False

    def result(self):
        raise Enough


def score_only(config):
    """A run up to where it needs the train step."""
    with pytest.MonkeyPatch.context() as patch:
        run_module = sys.modules["jaxpref.train.run"]
        patch.setattr(run_module, "in_background", lambda _: NotCompiled())
        with pytest.raises(Enough):
            run(config)


def config_for(inputs, out, **changes):
    options = data.DataOptions(max_length=64, heldout_fraction=0.2)
    defaults = dict(
        model=str(inputs / "model"),
        data=str(inputs / "pairs.jsonl"),
        out=str(out),
        objective=DPO,
        options=options,
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        max_steps=7,  # sees every record
        row_length="none",
        batch_size=8,
    )
    return TrainConfig(**(defaults | changes))


def tables(folder: Path) -> dict[str, float]:
    """Everything in a folder of shards, by key."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        shard = load_file(path)
        keys = [bytes(key).decode().rstrip("\0") for key in shard["keys"]]
        found |= zip(keys, shard["values"].tolist(), strict=True)
    return found


def first_loss(out):
    lines = read_metrics(out / "metrics.jsonl")
    return next(line["loss"] for line in lines if "loss" in line)


@pytest.mark.parametrize(
    "row_length",
    [pytest.param("none", marks=pytest.mark.slow, id="padded"), 64],
)
def test_a_sweep_scores_the_reference_once(
    inputs, tmp_path, shared_folder, scored, row_length
):
    """Other losses, flips and seeds find every number, and start at log 2."""
    noisy = data.DataOptions(
        max_length=64, heldout_fraction=0.2, inject=data.InjectOptions(flip_rate=0.4)
    )
    config = lambda name, **changes: config_for(
        inputs, tmp_path / name, row_length=row_length, batch_size=16, **changes
    )
    run(config("first", objective=from_loss(losses.ipo)))
    assert scored == [52, 12]
    run(config("flipped", options=noisy, seed=3))
    assert scored == [52, 12]
    assert len(list(shared_folder.iterdir())) == 1
    assert first_loss(tmp_path / "flipped") == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.slow
def test_losses_that_read_more_share_what_they_can(
    inputs, tmp_path, shared_folder, scored
):
    """Of a prefix there are other numbers, beside those of whole completions."""
    noisy = data.DataOptions(
        max_length=64, heldout_fraction=0.2, inject=data.InjectOptions(flip_rate=0.4)
    )
    config = lambda name, **changes: config_for(inputs, tmp_path / name, **changes)
    run(config("first"))
    run(config("wpo", objective=from_loss(losses.wpo), options=noisy))
    assert scored == [52, 12]
    assert first_loss(tmp_path / "wpo") > 0
    run(config("prefix", objective=from_loss(losses.ld_dpo)))
    assert scored == [52, 12] * 2
    run(config("again", objective=from_loss(losses.ld_dpo), options=noisy))
    assert scored == [52, 12] * 2
    assert len(list(shared_folder.iterdir())) == 1


def test_a_hit_gives_the_bits_of_a_miss(inputs, tmp_path, shared_folder, monkeypatch):
    """Also where the numbers were computed of flipped pairs, in blocks."""
    noisy = data.DataOptions(
        max_length=64, heldout_fraction=0.2, inject=data.InjectOptions(flip_rate=0.4)
    )
    monkeypatch.setattr(score_tables, "SHARD", 16)
    score_only(config_for(inputs, tmp_path / "noisy", options=noisy))
    monkeypatch.undo()
    monkeypatch.setenv("JAXPREF_CACHE", str(shared_folder.parent))
    run(config_for(inputs, tmp_path / "hit"))
    monkeypatch.setenv("JAXPREF_CACHE", str(tmp_path / "another"))
    run(config_for(inputs, tmp_path / "miss"))
    hit, miss = (tables(tmp_path / name / "reference") for name in ("hit", "miss"))
    assert len(hit) == 128 and hit == miss
    weights = "export/model.safetensors"
    assert (tmp_path / "hit" / weights).read_bytes() == (
        tmp_path / "miss" / weights
    ).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"reference": "other"},
        {"compute_dtype": "bfloat16"},
        {"batch_size": 16},
        {"row_length": 32},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_numbers_changes_the_folder(
    inputs, tmp_path, shared_folder, scored, change
):
    score_only(config_for(inputs, tmp_path / "one"))
    changed = {k: str(inputs / v) if v == "other" else v for k, v in change.items()}
    score_only(config_for(inputs, tmp_path / "two", **changed))
    assert scored == [52, 12] * 2
    assert len(list(shared_folder.iterdir())) == 2


def test_other_tokens_are_other_keys():
    """A template or tokenizer shows itself in the tokens; a flip does not."""

    def keys(
        *, prompt=(1, 5, 6), sides=((7, 2), (8, 9, 2)), names=("reference_logps",)
    ):
        builder = data.DatasetBuilder(2)
        builder.add(list(prompt), [list(side) for side in sides], id="a")
        return score_tables.score_keys(builder.build(), names)[:, 0].tolist()

    ((chosen, rejected),) = keys()
    assert keys(sides=((8, 9, 2), (7, 2))) == [[rejected, chosen]]
    assert not {chosen, rejected} & set(keys(prompt=(1, 5, 6, 3))[0])
    assert keys(sides=((7, 2), (8, 9, 3)))[0][0] == chosen
    assert keys(sides=((7, 2), (8, 9, 3)))[0][1] != rejected
    # The border between prompt and completion counts.
    assert keys(prompt=(1, 5), sides=((6, 7, 2), (6, 8, 9, 2))) != keys()
    both = ("reference_logps", "reference_prefix_logps")
    assert keys(names=both) == [[chosen, rejected], [f"{chosen}.2", f"{rejected}.2"]]


def test_a_killed_pass_goes_on_where_it_was(
    inputs, tmp_path, shared_folder, scored, monkeypatch
):
    monkeypatch.setattr(score_tables, "SHARD", 12)  # two batches of eight
    counting = task.score_dataset

    def mortal(*args, **options):
        if len(scored) == 2:
            raise KeyboardInterrupt
        return counting(*args, **options)

    monkeypatch.setattr(task, "score_dataset", mortal)
    with pytest.raises(KeyboardInterrupt):
        run(config_for(inputs, tmp_path / "one"))
    assert scored == [16, 16]
    monkeypatch.setattr(task, "score_dataset", counting)
    score_only(config_for(inputs, tmp_path / "two"))
    assert scored == [16, 16, 16, 4, 12]


def test_a_damaged_shard_and_a_gap_are_computed_again(
    inputs, tmp_path, shared_folder, scored, monkeypatch, caplog
):
    monkeypatch.setattr(score_tables, "SHARD", 16)
    score_only(config_for(inputs, tmp_path / "one"))
    whole = tables(shared_folder)
    (folder,) = shared_folder.iterdir()
    damaged, lost, *others = sorted(folder.glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    missing = sum(len(load_file(path)["keys"]) // 2 for path in (damaged, lost))
    lost.unlink()
    scored.clear()
    score_only(config_for(inputs, tmp_path / "two"))
    assert "damaged; its scores" in caplog.text
    assert sum(scored) == missing
    assert tables(shared_folder) == tables(tmp_path / "two" / "reference") == whole


def test_a_run_resumes_without_the_cache_and_without_its_copy(
    inputs, tmp_path, shared_folder, scored
):
    out = tmp_path / "run"
    config = config_for(inputs, out, max_steps=2, objective=from_loss(losses.ipo))
    run(config)
    before = tables(out / "reference")
    shutil.rmtree(shared_folder)
    run(config)  # its own copy
    assert scored == [16, 12] and not shared_folder.exists()
    shutil.rmtree(out / "reference")
    run(config)  # of the reference's folder, never of the weights that were trained
    assert scored == [16, 12] * 2
    assert tables(out / "reference") == tables(shared_folder) == before
    shutil.rmtree(out / "reference")
    run(config)
    assert scored == [16, 12] * 2 and tables(out / "reference") == before


def test_a_reference_of_another_size_is_refused_even_if_its_scores_are_known(
    inputs, tmp_path, shared_folder
):
    small = shutil.copytree(inputs / "model", tmp_path / "small")
    fields = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(fields | {"rope_theta": 5000.0}))
    score_only(config_for(inputs, tmp_path / "known", model=str(small)))
    with pytest.raises(InputError, match="the same architecture"):
        run(config_for(inputs, tmp_path / "run", reference=str(small)))


def test_a_cache_that_cannot_be_written_is_told(inputs, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("JAXPREF_CACHE", str(tmp_path / "file" / "cache"))
    score_only(config_for(inputs, tmp_path / "run"))
    assert "file/cache" in caplog.text and "compute these scores again" in caplog.text
    assert len(tables(tmp_path / "run" / "reference")) == 128


def test_the_reference_is_gone_before_the_optimizer_comes(
    inputs, tmp_path, shared_folder, monkeypatch
):
    """Bytes of live arrays: first one model, then the training state, nothing else."""
    alive = lambda: sum(x.nbytes for x in jax.live_arrays())
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    # Once the state exists; `jaxpref.train.run` itself is the function.
    run_module = sys.modules["jaxpref.train.run"]
    make_tables, make_feed = begin.score_tables, run_module._feed
    seen = {}

    def tables_made(*args, load, **options):
        def loaded():
            params = load()
            seen["model"] = size(params)
            return params

        found = make_tables(*args, load=loaded, **options)
        gc.collect()
        seen["before"] = alive()
        return found

    def state_made(*args):
        gc.collect()
        seen["after"] = alive()
        return make_feed(*args)

    monkeypatch.setattr(begin, "score_tables", tables_made)
    monkeypatch.setattr(run_module, "_feed", state_made)
    for name in (None, str(inputs / "other")):
        gc.collect()
        start = alive()
        run(config_for(inputs, tmp_path / str(bool(name)), reference=name))
        model = seen["model"]
        slack = model // 20  # keys, counters
        assert model <= seen["before"] - start < model + slack
        # Parameters and two moments.
        assert 3 * model <= seen["after"] - start < 3 * model + slack


def test_step_0_is_scored_only_under_another_reference(
    inputs, tmp_path, shared_folder, monkeypatch
):
    """What is reused are the numbers that scoring the policy gives."""
    score_dataset, titles = task.score_dataset, []

    def noted(*args, title, **options):
        titles.append(title)
        return score_dataset(*args, title=title, **options)

    def first_evaluation(name, **changes):
        titles.clear()
        run(config_for(inputs, tmp_path / name, max_steps=1, **changes))
        return read_metrics(tmp_path / name / "metrics.jsonl")[0]

    monkeypatch.setattr(task, "score_dataset", noted)
    other = first_evaluation("other", reference=str(inputs / "other"))
    assert "evaluation at step 0" in titles
    assert abs(other["eval_loss"] - np.log(2)) > 1e-4
    reused = first_evaluation("reused")
    assert "evaluation at step 0" not in titles
    monkeypatch.setattr(task.Task, "scores_before_training", lambda *_: None)
    assert first_evaluation("scored") == reused
    assert "evaluation at step 0" in titles


# ---- the folder of shards ---------------------------------------------------------


def test_what_is_not_there_is_nan(tmp_path):
    keys = np.array([["a" * 32, "b" * 32], ["c" * 32, "a" * 32]])
    assert np.isnan(score_cache.read(tmp_path / "nowhere", keys, {})).all()
    values = np.array([[1, np.nan], [3, 1]], np.float32)
    score_cache.append(tmp_path, keys, values, {})
    np.testing.assert_array_equal(score_cache.read(tmp_path, keys, {}), values)
    # Another shard fills the gap; its keys are longer.
    more = np.array(["b" * 32, "b" * 32 + ".7", "a" * 32 + ".7"])
    assert np.isnan(score_cache.read(tmp_path, more, {})).all()
    more = more[:2]
    score_cache.append(tmp_path, more, np.array([2, 9], np.float32), {})
    np.testing.assert_array_equal(
        score_cache.read(tmp_path, keys, {}), [[1, 2], [3, 1]]
    )
    np.testing.assert_array_equal(score_cache.read(tmp_path, more, {}), [2, 9])
    assert score_cache.read(tmp_path, keys[:0], {}).shape == (0, 2)


def test_the_same_numbers_are_the_same_file(tmp_path):
    keys = np.array(["b" * 32, "a" * 32])
    about = {name: name for name in "abcdefgh"}
    for order in (slice(None), slice(None, None, -1)):
        values = np.arange(2, dtype=np.float32)
        score_cache.append(tmp_path, keys[order], values[order], about)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_shard_cut_off_is_removed(tmp_path, caplog):
    keys = np.array(["a" * 32, "b" * 32])
    score_cache.append(tmp_path, keys, np.ones(2, np.float32), {})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    assert np.isnan(score_cache.read(tmp_path, keys, {})).all()
    assert "damaged; its scores" in caplog.text and not path.exists()


def test_a_damaged_shard_that_cannot_be_removed_is_passed_over(
    tmp_path, monkeypatch, caplog
):
    keys = np.array(["a" * 32, "b" * 32])
    score_cache.append(tmp_path, keys[:1], np.ones(1, np.float32), {})
    (path,) = tmp_path.iterdir()
    score_cache.append(tmp_path, keys[1:], np.ones(1, np.float32), {})
    path.write_bytes(path.read_bytes()[:-5])

    def unlink(path, missing_ok=False):
        raise PermissionError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", unlink)
    np.testing.assert_array_equal(score_cache.read(tmp_path, keys, {}), [np.nan, 1])
    assert "damaged; its scores" in caplog.text


WRITE = """
import sys
from pathlib import Path
import numpy as np
from jaxpref.scoring import score_cache

for n in range(60):
    keys = np.array([f"{k:032d}" for k in range(5 * n, 5 * n + 10)])
    values = np.arange(5 * n, 5 * n + 10, dtype="f4")
    score_cache.append(Path(sys.argv[1]), keys, values, {})
    assert np.isfinite(score_cache.read(Path(sys.argv[1]), keys, {})).all()
"""


def test_two_runs_write_at_the_same_time(tmp_path):
    folder = tmp_path / "cache"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITE, folder], cwd=ROOT)
        for _ in range(2)
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    keys = np.array([f"{k:032d}" for k in range(305)])
    np.testing.assert_array_equal(score_cache.read(folder, keys, {}), np.arange(305))
    assert {path.suffix for path in folder.iterdir()} == {".safetensors"}


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXPREF_CACHE", "mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("JAXPREF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/jaxpref")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/nobody")
    assert cache_folder() == Path("/nobody", ".cache", "jaxpref")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(InputError, match="set JAXPREF_CACHE"):
        cache_folder()


LOADED = """
import sys
import jaxpref.scoring.score_dataset, jaxpref.scoring.scorer, jaxpref.data.layouts
import jaxpref.models.families.llama
files = (getattr(m, "__file__", None) for n, m in sys.modules.items() if "jaxpref" in n)
print(*filter(None, files))
"""


def test_all_code_that_scores_invalidates_the_cache():
    """Every file of ours that scoring imports, except those that compute no score."""
    found = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True
    )
    package = Path(made_by.__file__).parents[1]
    paths = {str(Path(p).relative_to(package)) for p in found.stdout.split()}
    covered = {
        str(path.relative_to(package))
        for pattern in made_by.SCORED_BY
        for path in package.glob(pattern)
    }
    others = ("runtime/", "losses/", "errors.py", "files.py", "__init__.py")
    others += ("scoring/__init__.py", "scoring/checks.py", "scoring/reward_metrics.py")
    left = {p for p in paths - covered if not p.startswith(others)}
    assert left <= {"scoring/made_by.py"}
    assert "models/families/llama.py" in covered and "losses/_sequence.py" in covered
