"""`jaxpref merge` against float64 numpy, closed forms, and results of mergekit."""

import json
import re
import shutil
import weakref
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpref import cli
from jaxpref.cli import merge as merge_command
from jaxpref.errors import InputError
from jaxpref.evaluate.pairs import EvaluateConfig, open_pairs
from jaxpref.merge import inputs as merge_inputs
from jaxpref.merge import output as merge_output
from jaxpref.merge.arrays import add_task_vectors, slerp, weighted_mean
from jaxpref.merge.greedy import greedy_soup
from jaxpref.models import RewardModel, build
from jaxpref.models.adapter_files import save_adapter
from jaxpref.models.families import llama
from jaxpref.models.folder import load_params, save
from jaxpref.models.hub import adapter_digest, model_digests
from jaxpref.models.lora import LoraOptions, lora_of
from jaxpref.models.weights import Weights
from tests.data import make_mergekit
from tests.family_cases import CASES, architecture_of, random_params
from tests.tiny import (
    make_model_folder,
    make_pairs_file,
    make_tokenizer,
    tiny_config,
    tiny_params,
)

EPSILON = 2.0**-23
"""The distance of float32 numbers at 1."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three language models a, b and c, reward models ra and rb, and pairs."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        make_model_folder(folder / name, seed)
    model = RewardModel(tiny_config())
    for seed, name in enumerate(("ra", "rb")):
        save(folder / name, model, tiny_params(model, seed), folder / "a")
    make_pairs_file(folder / "pairs.jsonl", 20)
    return folder


@pytest.fixture
def merge(folders, tmp_path, monkeypatch):
    """Runs the command in a folder of its own with links to the models."""
    monkeypatch.chdir(tmp_path)
    for path in folders.iterdir():
        (tmp_path / path.name).symlink_to(path)

    def run(line: str) -> dict[str, np.ndarray]:
        merge_command.command(f"{line} --out out".split())
        return tensors("out")

    return run


def tensors(folder):
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(path)
    return found


def exact(folder):
    return {name: np.asarray(x, np.float64) for name, x in tensors(folder).items()}


def change(source, folder, **changed):
    """A copy of a model folder with other tensors; None removes one."""
    shutil.copytree(source, folder)
    kept = {n: x for n, x in (tensors(source) | changed).items() if x is not None}
    save_file(kept, folder / "model.safetensors")
    return folder


def configure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ---- the equations


SHAPES = [(7,), (5, 6), (2, 3, 4)]


def drawn(shape, count=3):
    rng = np.random.default_rng(5)
    return [rng.normal(size=shape).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [(1, 1, 1), (0.2, 0.3, 0.5), (2.5, -1.0, 0.5)])
def test_weighted_mean(shape, weights):
    given = drawn(shape)
    expected = np.average(np.asarray(given, np.float64), axis=0, weights=weights)
    found = weighted_mean(iter(given), weights)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=8 * EPSILON)


@pytest.mark.parametrize("shape", SHAPES)
def test_task_vectors(shape):
    base, *given = drawn(shape)
    expected = np.asarray(base, np.float64)
    expected = expected + 1.5 * (given[0] - expected) - 0.25 * (given[1] - expected)
    found = add_task_vectors(base, iter(given), (1.5, -0.25))
    np.testing.assert_allclose(found, expected, rtol=0, atol=8 * EPSILON)
    unchanged = add_task_vectors(base, [base, base], (1.7, 3.0))
    np.testing.assert_array_equal(unchanged, base)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_of_a_known_angle(t):
    """On the unit circle it is a rotation; lengths of the ends scale its terms."""
    angle = 2.1
    start = np.array([[1.0, 0.0]], np.float32)
    end = np.array([[np.cos(angle), np.sin(angle)]], np.float32)
    expected = [[np.cos(t * angle), np.sin(t * angle)]]
    np.testing.assert_allclose(slerp(start, end, t), expected, atol=2 * EPSILON)
    terms = [np.sin((1 - t) * angle), np.sin(t * angle)] / np.sin(angle)
    expected = 2 * terms[0] * start + 5 * terms[1] * end
    np.testing.assert_allclose(slerp(2 * start, 5 * end, t), expected, atol=8 * EPSILON)


def test_slerp_without_an_arc_is_linear():
    (start,) = drawn((4, 4), 1)
    for end in (start, 3 * start, -2 * start, 0 * start):
        expected = 0.75 * start + 0.25 * np.asarray(end, np.float64)
        np.testing.assert_allclose(slerp(start, end, 0.25), expected, atol=4 * EPSILON)


def test_means_of_known_accuracy_are_chosen_greedily():
    """The numbers of every step are written by hand."""
    means = {(1, 2): 0.8, (0, 1, 2): 0.79, (1, 2, 3): 0.85}
    tried = []

    def accuracy_of(kept):
        tried.append(tuple(sorted(kept)))
        return means[tried[-1]]

    trials = greedy_soup([0.7, 0.8, 0.75, 0.7], accuracy_of)
    assert tried == [(1, 2), (0, 1, 2), (1, 2, 3)]
    assert [(x.model, x.accuracy, x.with_soup, x.kept) for x in trials] == [
        (1, 0.8, 0.8, True),
        (2, 0.75, 0.8, True),  # not below what it was
        (0, 0.7, 0.79, False),
        (3, 0.7, 0.85, True),
    ]


# ---- folders


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    make_mergekit.make_models(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("linear", "--models a b c --weights 0.6 0.3 0.9"),
        ("slerp", "--models a b --weights 0.7 0.3"),
        ("task", "--models a b --base c --weights 1.5 -0.5"),
    ],
)
def test_results_of_mergekit(small, monkeypatch, name, line):
    monkeypatch.chdir(small)
    out = f"out-{name}"
    merge_command.command(f"{line} --method {name} --out {out}".split())
    found = tensors(out)
    with np.load(make_mergekit.FILE) as file:
        expected = {
            path.partition("/")[2]: file[path]
            for path in file.files
            if path.startswith(f"{name}/")
        }
    assert found.keys() == expected.keys()
    for tensor, values in expected.items():
        np.testing.assert_allclose(found[tensor], values, rtol=0, atol=4 * EPSILON)


def test_weights_of_blocks_of_layers(merge):
    found = merge("--models a b c --weights 2 1 1 --layer-weights 1=0.5,0,1.5")
    given = [exact(name) for name in "abc"]
    for name, values in found.items():
        weights = (0.25, 0, 0.75) if ".layers.1." in name else (0.5, 0.25, 0.25)
        expected = sum(w * x[name] for w, x in zip(weights, given))
        np.testing.assert_allclose(values, expected, rtol=0, atol=4 * EPSILON)
    record = json.loads(Path("out/merge.json").read_text())
    assert record["weights"] == [0.5, 0.25, 0.25]
    assert record["layer_weights"] == [
        {"first": 1, "last": 1, "weights": [0.25, 0.0, 0.75]}
    ]


def test_scales_of_blocks_of_layers(merge):
    found = merge(
        "--models a --method task --base b --weights 0 --layer-weights 0-0=1 1=2"
    )
    a, b = exact("a"), exact("b")
    for name, values in found.items():
        scale = 1 if ".layers.0." in name else 2 if ".layers.1." in name else 0
        expected = b[name] + scale * (a[name] - b[name])
        np.testing.assert_allclose(values, expected, rtol=0, atol=8 * EPSILON)


def test_the_record_and_the_other_files(merge, capsys):
    merge("--models a b --weights 1 3")
    out = Path("out")
    record = json.loads((out / "merge.json").read_text())
    digests = [model_digests(Path(x))["weights"] for x in "ab"]
    assert record["method"] == "linear" and record["weights"] == [0.25, 0.75]
    assert record["models"] == [
        {"model": name, "weights_sha256": digest} for name, digest in zip("ab", digests)
    ]
    for path in Path("a").iterdir():
        if path.suffix != ".safetensors":
            assert json.loads((out / path.name).read_text()) == json.loads(
                path.read_text()
            )
    line = (
        "out: merged 2 models (linear, weights 0.25 0.75), 21 tensors, 5,968 weights, "
        "23,872 bytes"
    )
    assert line in capsys.readouterr().out
    assert not [x for x in Path().iterdir() if "partial" in x.name]


def test_reward_models(merge):
    found = merge("--models ra rb")
    a, b = exact("ra"), exact("rb")
    assert "score.weight" in found and found.keys() == a.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, (a[name] + b[name]) / 2, atol=2 * EPSILON)
    load_params("out", RewardModel(tiny_config()))


def as_dtype(source, folder, dtype):
    cast = {name: x.astype(dtype) for name, x in tensors(source).items()}
    return change(source, folder, **cast)


def test_each_tensor_keeps_the_dtype_of_the_first_model(merge, tmp_path):
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    as_dtype("a", tmp_path / "a16", bfloat16)
    norm = {"model.norm.weight": tensors("a")["model.norm.weight"]}
    change("a16", tmp_path / "mixed", **norm)
    as_dtype("b", tmp_path / "b16", np.float16)
    found = merge("--models mixed b16 c --weights 0.2 0.3 0.5")
    given = [exact(name) for name in ("mixed", "b16", "c")]
    for name, values in found.items():
        assert values.dtype == (np.float32 if name in norm else bfloat16)
        sums = sum(w * x[name] for w, x in zip((0.2, 0.3, 0.5), given))
        scale = sum(np.abs(w * x[name]) for w, x in zip((0.2, 0.3, 0.5), given))
        # Half a unit in the last place of the result, and the rounding of the sum.
        allowed = (
            np.abs(sums) * ml_dtypes.finfo(values.dtype).eps / 2 + scale * 4 * EPSILON
        )
        assert (np.abs(values.astype(np.float64) - sums) <= allowed).all()


def test_another_dtype(merge, tmp_path):
    found = merge("--models a b --dtype bfloat16")
    assert {str(x.dtype) for x in found.values()} == {"bfloat16"}
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == (
        "bfloat16"
    )
    big = {"model.norm.weight": np.full(16, 9e4, np.float32)}
    for name in "ab":
        change(name, tmp_path / f"big{name}", **big)
    with pytest.raises(InputError, match=r"model.norm.weight: .* 9e\+04 is not finite"):
        merge("--models biga bigb --dtype float16")


def test_files_with_an_index(merge, folders, tmp_path, monkeypatch):
    """Read and written: the same tensors as from one file."""
    whole = merge("--models a b")
    model = build(tiny_config())
    save(
        tmp_path / "many",
        model,
        tiny_params(model, 1),
        folders / "b",
        max_file_bytes=9000,
    )
    assert len([*(tmp_path / "many").glob("*.safetensors")]) > 2
    folders_ = merge_inputs.open_folders(["a", "many"])
    weights = merge_output.Weights((0.5, 0.5))
    merged = merge_output.Merge(folders_, folders_[0], weighted_mean, weights)
    size = merge_output.write_merge(
        tmp_path / "parts", merged, None, {}, max_file_bytes=9000
    )
    files = [*(tmp_path / "parts").glob("*.safetensors")]
    assert len(files) > 2
    assert all(sum(x.nbytes for x in load_file(f).values()) <= 9000 for f in files)
    assert (size.tensors, size.weights, size.bytes) == (21, 5968, 4 * 5968)
    found = tensors("parts")
    assert found.keys() == whole.keys()
    assert all(np.array_equal(found[name], whole[name]) for name in whole)
    load_params(tmp_path / "parts", model)


FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"


def test_a_tied_head_and_frequencies(merge, tmp_path):
    """A stored head is left out, and frequencies are those of the first model."""
    for seed, name in enumerate(("ta", "tb")):
        make_model_folder(tmp_path / name, seed, tie_word_embeddings=True)
    embedding = {"lm_head.weight": tensors("ta")["model.embed_tokens.weight"]}
    more = {FREQUENCIES: np.float32([1, 0.1])}
    change("ta", tmp_path / "head", **embedding, **more)
    for line in ("--models head tb", "--models tb head"):
        found = merge(line)
        first = line.split()[1]
        assert found.keys() == tensors(first).keys() - {"lm_head.weight"}
        if first == "head":
            np.testing.assert_array_equal(found[FREQUENCIES], more[FREQUENCIES])
        load_params("out", build(tiny_config(tie_word_embeddings=True)))
    wrong = {"lm_head.weight": tensors("a")["lm_head.weight"]}
    change("ta", tmp_path / "wrong", **wrong)
    with pytest.raises(InputError, match="wrong: tensor lm_head.weight differs from"):
        merge("--models ta wrong")


@pytest.mark.parametrize(
    "line",
    [
        "--models a b c",
        "--models a b --method slerp",
        "--models a b --method task --base c --weights 1 1",
    ],
)
def test_one_tensor_of_each_model_is_in_memory(merge, monkeypatch, line):
    opened, read = merge_inputs.open_model, []

    class Watched:
        """A tensor in a file; sees to it that no other of its folder is in memory."""

        def __init__(self, tensor, alive):
            self.tensor, self.alive = tensor, alive

        def __getattr__(self, name):
            return getattr(self.tensor, name)

        def __getitem__(self, index):
            assert not any(reference() is not None for reference in self.alive)
            values = self.tensor[index]
            self.alive[:] = [weakref.ref(values)]
            read.append(values.nbytes)
            return values

    def watched(folder, family):
        alive = []
        return {name: Watched(x, alive) for name, x in opened(folder, family).items()}

    monkeypatch.setattr(merge_inputs, "open_model", watched)
    merge(line)
    count = sum(name in "abc" for name in line.split())
    assert sum(read) == count * 4 * 5968  # every tensor once


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if " " not in case])
def test_every_family(tmp_path, monkeypatch, case):
    """With a head and without, and another weight for one layer."""
    monkeypatch.chdir(tmp_path)
    for kind, make in (("lm", build), ("reward", RewardModel)):
        model = make(architecture_of(case))
        for seed, name in enumerate("ab"):
            folder = tmp_path / kind / name
            folder.mkdir(parents=True)
            make_tokenizer(folder)
            save(folder, model, random_params(model, seed))
        line = "--weights 0.75 0.25 --layer-weights 1=0,1 --out"
        models = [f"{kind}/a", f"{kind}/b"]
        merge_command.command(["--models", *models, *line.split(), f"{kind}/c"])
        a, b = map(exact, models)
        for name, values in tensors(f"{kind}/c").items():
            share = 1 if re.search(r"\b(layers|h)\.1\.", name) else 0.25
            expected = (1 - share) * a[name] + share * b[name]
            np.testing.assert_allclose(values, expected, rtol=0, atol=8 * EPSILON)
        assert tensors(f"{kind}/c").keys() == a.keys()
        load_params(f"{kind}/c", model)


# ---- greedy soups


def test_a_greedy_soup(merge, tmp_path, capsys):
    """The accuracies are those of `jaxpref evaluate` on the merged folders."""
    merge_command.command("--models a b --out mean".split())
    _, score = open_pairs(
        EvaluateConfig(
            model="a",
            data="pairs.jsonl",
            out="unused",
            reference="c",
            max_length=64,
            batch_size=8,
        )
    )
    accuracies = {}
    for name in ("a", "b", "mean"):
        rewards = score(Weights(Path(name))).rewards
        accuracies[name] = np.mean(rewards[:, 0] > rewards[:, 1])
    first, second = sorted("ab", key=lambda name: -accuracies[name])
    best, mean = accuracies[first], accuracies["mean"]
    capsys.readouterr()
    found = merge(
        "--models a b --method greedy --data pairs.jsonl --reference c --max-length 64 "
        "--batch-size 8"
    )
    printed = capsys.readouterr().out
    kept = bool(mean >= best)
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert record["trials"] == [
        {"model": first, "accuracy": best, "with_soup": best, "kept": True},
        {
            "model": second,
            "accuracy": accuracies[second],
            "with_soup": mean,
            "kept": kept,
        },
    ]
    expected = tensors("mean" if kept else first)
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    for name in "ab":
        assert f"\n{name}  " in printed and f"{accuracies[name]:.4f}" in printed
    assert not [x for x in tmp_path.iterdir() if x.name.startswith(".")]


def test_a_greedy_soup_of_reward_models(merge, tmp_path):
    merge("--models ra rb --method greedy --data pairs.jsonl --max-length 64")
    trials = json.loads((tmp_path / "out/merge.json").read_text())["trials"]
    assert sorted(x["model"] for x in trials) == ["ra", "rb"]
    with pytest.raises(InputError, match="--reference a: ra is a reward model"):
        merge("--models ra rb --method greedy --data pairs.jsonl --reference a")


# ---- what is refused


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--models a", ["--models a: --method linear takes at least two models"]),
        ("--models a b c --method slerp", ["takes exactly two models, not 3"]),
        ("--models a b --weights 1", ["--weights 1: 1 weights for 2 models"]),
        ("--models a b --weights 1 -1", ["--weights 1 -1: sum to 0", "task"]),
        ("--models a b --weights nan 1", ["must be finite"]),
        ("--models a b --method slerp --weights 1 1", ["must sum to 1 for slerp"]),
        ("--models a b --layer-weights 1-2=1,1", ["1-2=1,1: no such layers", "0 to 1"]),
        ("--models a b --layer-weights 1-0=1,1", ["no such layers"]),
        ("--models a b --layer-weights 0-1=1", ["0-1=1: 1 weights for 2 models"]),
        ("--models a b --layer-weights 0-1", ["0-1: expected layers and one weight"]),
        ("--models a b --layer-weights 0=1,x", ["0=1,x: expected layers and one"]),
        ("--models a b --layer-weights 0-1=1,1 1=1,2", ["1=1,2: overlaps", "0-1"]),
        ("--models a b --method task --base c", ["--method task: needs --weights"]),
        ("--models a b --base c", ["--base: jaxpref merge --method linear has no"]),
        (
            "--models a b --method greedy --data pairs.jsonl --weights 1 1",
            ["--weights: jaxpref merge --method greedy has no such option"],
        ),
        ("--models a b --method greedy", ["--method greedy: needs --data"]),
        ("--models a b --method slepr", ["--method slepr: expected", "mean slerp?"]),
        ("--models a b --dtype int8", ["--dtype int8: expected float32|float16"]),
        ("--models a ra", ["ra: is a reward model, but a is a language model"]),
        ("--models a missing", ["missing: no such folder"]),
        ("--models a narrow", ["narrow: config.json says hidden_size=8", "a says 16"]),
        ("--models a gone", ["gone: tensor model.norm.weight is missing"]),
        ("--models a nan", ["nan: tensor model.norm.weight holds NaN"]),
        ("--models a shape", ["shape: tensor model.norm.weight has shape [8]"]),
        ("--models a words", ["words: token 'a' is 4 in its vocabulary, but 5 in"]),
        ("--models a mute", ["mute: the folder has no tokenizer"]),
        (
            "--models a --method task --base b --weights 1e39",
            ["tensor lm_head.weight: is not finite with these weights"],
        ),
        ("--models a b --out b", ["--out b: holds a model"]),
    ],
)
def test_refused_in_one_line(merge, broken, capsys, line, parts):
    words = line.split()
    words += [] if "--out" in words else ["--out", "out"]
    before = {path: model_digests(path) for path in broken.iterdir() if path.is_dir()}
    with pytest.raises(SystemExit) as ended:
        cli.main(["merge", *words])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    (message,) = [x for x in error.splitlines() if x.startswith("jaxpref: error:")]
    assert all(part in message for part in parts), message
    assert not (broken / "out/config.json").exists()
    assert not [x for x in broken.iterdir() if x.name.startswith(".")]
    assert all(model_digests(path) == digest for path, digest in before.items())


@pytest.fixture
def broken(merge, faulty, tmp_path):
    for path in faulty.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture(scope="module")
def faulty(folders, tmp_path_factory):
    """Copies of the model b, each with a fault."""
    folder = tmp_path_factory.mktemp("faulty")
    b, norm = folders / "b", "model.norm.weight"
    make_model_folder(folder / "narrow", **make_mergekit.SIZES)
    change(b, folder / "gone", **{norm: None})
    change(b, folder / "shape", **{norm: np.ones(8, np.float32)})
    change(b, folder / "nan", **{norm: np.full(16, np.nan, np.float32)})
    shutil.copytree(b, folder / "words")
    path = folder / "words/tokenizer.json"
    fields = json.loads(path.read_text())
    vocabulary = fields["model"]["vocab"]
    vocabulary |= {"the": vocabulary["a"], "a": vocabulary["the"]}
    path.write_text(json.dumps(fields))
    shutil.copytree(b, folder / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    return folder


def test_an_earlier_merge_is_replaced_and_no_other_model(merge, tmp_path):
    merge("--models a b --dtype bfloat16")
    (tmp_path / "out/notes.txt").write_text("mine")
    (tmp_path / "out/model-00001-of-00002.safetensors").write_text("earlier")
    again = merge("--models b c")
    b, c = exact("b"), exact("c")
    for name, values in again.items():
        np.testing.assert_allclose(values, (b[name] + c[name]) / 2, atol=2 * EPSILON)
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    with pytest.raises(InputError, match="--out out: is --models out, which this"):
        merge("--models out b")


# ---- adapters


def make_adapter(folder, targets="q_proj,down_proj", **options):
    """A random adapter of the model a."""
    model = build(tiny_config())
    lora = lora_of(LoraOptions(rank=2, targets=targets, **options), llama.FAMILY)
    params = lora.trained(tiny_params(model), model, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape), params)
    options = dict(base="a", dtype="float32", reward=False)
    save_adapter(folder, lora, model, params, **options)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_merged_into_its_model(merge, tmp_path, dora):
    stored = make_adapter(tmp_path / "adapter", dora=dora)
    found = merge("--models a --method adapter --adapter adapter")
    before = exact("a")
    assert found.keys() == before.keys()
    adapted = 0
    for name, values in before.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in stored:
            np.testing.assert_array_equal(found[name], values)
            continue
        adapted += 1
        a, b = (stored[f"{module}.lora_{x}.weight"].astype(float) for x in "AB")
        values = values + 2 * b @ a  # alpha is twice the rank
        if dora:
            norms = np.linalg.norm(values, axis=1)
            m = stored[f"{module}.lora_magnitude_vector"]
            values = values * (m / norms)[:, None]
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6)
    assert adapted == 4
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["adapter"]["adapter"] == "adapter"
    assert record["adapter"]["sha256"] == adapter_digest(tmp_path / "adapter")


def test_adapters_that_cannot_be_merged(merge, tmp_path):
    make_adapter(tmp_path / "adapter")
    with pytest.raises(InputError, match="--method adapter takes one model, not 2"):
        merge("--models a b --method adapter --adapter adapter")
    with pytest.raises(InputError, match="has no adapter_config.json"):
        merge("--models a --method adapter --adapter b")
    path = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(path.read_text()) | {"task_type": "SEQ_CLS"}
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError, match="is the adapter of a reward model, but a is"):
        merge("--models a --method adapter --adapter adapter")
