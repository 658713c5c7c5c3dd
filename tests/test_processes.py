"""One process of eight devices, two of four and four of two: the same run.

The same global batches, row by row, and the same numbers to rounding.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpref.train import read_metrics
from tests.answers import voted_records, write_records
from tests.tiny import make_model_folder, make_pairs_file
from tests.virtual import xla_flags

ROOT = Path(__file__).resolve().parents[1]

# Several commands in one life, since most of a short one is its start.
PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import jax
import numpy as np
from jaxpref import cli
import jaxpref.data.read as reading
import jaxpref.train

kept, folder = {}, sys.argv[2]
running = sys.modules["jaxpref.train.run"]  # not the function of this name

def placed(batch, mesh, place=running.to_global):
    # Of the global batch: who is in which row, as this process's devices hold it.
    found = place(batch, mesh)
    kept["rows made"].add(batch.tokens.shape[:2])
    rows = {}
    for shard in found.pair_index.addressable_shards:
        here = np.asarray(shard.data)
        first = shard.index[1].start or 0
        for a, r in np.ndindex(here.shape[:2]):
            name = f"{a},{first + r}"
            rows[name] = [kept["pairs"].ids[i] for i in here[a, r] if i >= 0]
    kept["batches"].append(rows)
    return found

def prepared(config, prepare=running.prepare):
    found = prepare(config)
    kept["pairs"] = found.datasets.splits.train
    return found

def made(*args, make=reading.make_splits, **kwargs):
    found = make(*args, **kwargs)
    kept["pairs read"] = len(found.train) + len(found.heldout)
    return found

running.to_global, running.prepare = placed, prepared
reading.make_splits = made

for name, argv in json.loads(sys.argv[3]).items():
    kept |= {"batches": [], "rows made": set()}
    sys.argv[1:] = argv
    cli.main()
    path = f"{folder}/{name}-{jax.process_index()}-of-{jax.process_count()}.json"
    with open(path, "w") as file:
        json.dump(kept | {"rows made": [*kept["rows made"]], "pairs": None}, file)
"""

STEPS = 4
EIGHTHS = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
RUNS = {
    "padded": EIGHTHS | {"row-length": "none"},
    "packed and accumulated": {
        "row-length": 64,
        "batch-size": 32,
        "accumulation": 2,
        "mesh.data": 4,
        "mesh.tensor": 2,
    },
}
ADAPTERS = {
    "adapters": EIGHTHS | {"row-length": "none", "lora.rank": 2},
    "on a quantized base": EIGHTHS
    | {"row-length": 64, "batch-size": 16, "lora.rank": 2, "lora.base": "nf4"},
}
GRID = {
    f"{name}, {layout}, accumulation {parts}": mesh
    | {"accumulation": parts}
    | ({"row-length": 64, "batch-size": 64} if layout == "packed" else {})
    | ({"batch-size": 16} if layout == "padded" else {})
    for name, mesh in {
        "data": {"mesh.data": 8},
        "fsdp": {"mesh.fsdp": 8},
        "data and fsdp": {"mesh.data": 2, "mesh.fsdp": 4},
        "fsdp and tensor": {"mesh.fsdp": 4, "mesh.tensor": 2},
        "all three": EIGHTHS,
    }.items()
    for layout in ("padded", "packed")
    for parts in (1, 2)
}


def command(inputs: Path, out: Path, **changes) -> list[str]:
    settings = {
        "model": inputs / "model",
        "data": inputs / "pairs.jsonl",
        "out": out,
        "loss": "rdpo",
        "loss.flip-rate": 0.2,
        "learning-rate": 1e-3,
        "max-length": 64,
        "max-prompt-length": 32,
        "heldout-fraction": 0.2,
        "max-steps": STEPS,
        "batch-size": 8,
        "log-every": 1,
        "eval-every": STEPS,
        "save-every": 2,
        **changes,
    }
    if "mesh.data" in changes:
        settings.setdefault("mesh.fsdp", 1)
    return ["train", *(str(x) for k, v in settings.items() for x in (f"--{k}", v))]


def sampling(inputs: Path, out: Path) -> list[str]:
    settings = {
        "model": inputs / "model",
        "data": inputs / "pairs.jsonl",
        "out": out,
        "limit": 5,
        "n": 3,
        "max-new-tokens": 8,
    }
    return ["sample", *(str(x) for k, v in settings.items() for x in (f"--{k}", v))]


def run_processes(
    folder: Path, argvs: dict[str, list[str]], count: int, *, devices: int = 8
):
    """Starts `count` processes that share so many devices; their exits and outputs.

    Each runs one command after the other.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = []
    for index in range(count):
        environ = os.environ | {"XLA_FLAGS": xla_flags(devices // count)}
        if count > 1:
            environ |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PROCESS, ROOT, folder, json.dumps(argvs)],
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        seconds = 120 + 60 * len(argvs)
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *output) for p, output in zip(processes, outputs)]


def run_all(
    folder: Path, runs: dict[str, dict], counts, *, pairs: int = 64
) -> dict[int, list[str]]:
    """All runs with each number of processes; what each printed.

    Those of two processes go on in one, where they are the first.
    """
    make_model_folder(folder / "model")
    make_pairs_file(folder / "pairs.jsonl", pairs)
    printed = {}
    for count in counts:
        out = folder / str(count)
        argvs = {k: command(folder, out / k, **v) for k, v in runs.items()}
        argvs["samples"] = sampling(folder, out / "samples.jsonl")
        if count == 1 and 2 in printed:
            argvs |= moved(folder, runs)
        done = run_processes(folder, argvs, count)
        assert [code for code, *_ in done] == [0] * count, [x[2][-3000:] for x in done]
        printed[count] = [stdout for _, stdout, _ in done]
    return printed


def moved(folder: Path, runs: dict[str, dict]) -> dict[str, list[str]]:
    """Copies of the runs of two processes as they were at step 2, to be finished."""
    argvs = {}
    for name, changes in runs.items():
        out = folder / "1" / f"{name}, moved"
        shutil.copytree(folder / "2" / name, out)
        shutil.rmtree(out / "export")
        shutil.rmtree(out / "checkpoints" / str(STEPS))
        argvs[out.name] = command(folder, out, **changes)
    return argvs


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_all(folder, RUNS, (2, 1))


def batches_of(folder: Path, name: str, count: int) -> list[list]:
    """The ids of each global batch, by row, put together from all processes."""
    parts = [
        json.loads((folder / f"{name}-{index}-of-{count}.json").read_text())["batches"]
        for index in range(count)
    ]
    batches = []
    for rows in zip(*parts):
        whole = {}
        for own in rows:
            # Rows that several processes hold are the same ones.
            assert all(whole.get(row, own[row]) == own[row] for row in own)
            whole |= own
        batches.append(sorted(whole.items()))
    return batches[:STEPS]


def check_equal(folder: Path, name: str, count: int, *, of: str | None = None) -> None:
    """A run by `count` processes is that by one."""
    expected, found = (
        read_metrics(folder / number / run / "metrics.jsonl")
        for number, run in (("1", name), (str(count), of or name))
    )
    shape = lambda lines: [(line["step"], "loss" in line) for line in lines]
    assert shape(found) == shape(expected)
    assert [x["step"] for x in found if "loss" in x] == list(range(1, STEPS + 1))
    for a, b in zip(found, expected, strict=True):
        for key in a.keys() - {
            "tokens_per_second",
            "pairs_per_second",
            "data_wait_fraction",
        }:
            # The same batches; float32 sums over devices come in another order.
            assert a[key] == pytest.approx(b[key], rel=2e-4, abs=2e-5), (a, key)
    weights = "export/model.safetensors"
    expected = load_file(folder / "1" / name / weights)
    found = load_file(folder / str(count) / (of or name) / weights)
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, atol=2e-5)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(done, name):
    """Four are a slow test."""
    folder, printed = done
    expected = batches_of(folder, name, 1)
    assert len(expected) == STEPS and len(expected[0]) == len(expected[1]) > 1
    assert batches_of(folder, name, 2) == expected
    check_equal(folder, name, 2)
    assert printed[2][0].count("export: ") == len(RUNS)
    assert "export: " not in printed[2][1]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_two_processes_goes_on_in_one(done, name):
    folder, printed = done
    check_equal(folder, name, 1, of=f"{name}, moved")
    rest = batches_of(folder, f"{name}, moved", 1)
    assert rest[: STEPS - 2] == batches_of(folder, name, 1)[2:]
    line = "resumed at step 2 in another environment (processes 2 -> 1): the same pairs"
    assert printed[1][0].count(line) == len(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_every_process_makes_its_share_and_reads_all(done, name):
    """Which pairs there are and who shares a row, each decides of all the text."""
    folder, _ = done
    kept = {
        count: [
            json.loads((folder / f"{name}-{i}-of-{count}.json").read_text())
            for i in range(count)
        ]
        for count in (1, 2)
    }
    ((parts, rows),) = kept[1][0]["rows made"]
    for count, found in kept.items():
        for own in found:
            assert own["rows made"] == [[parts, rows // count]]
            assert own["pairs read"] == 64


def test_processes_share_the_prompts_to_be_sampled(done):
    folder, _ = done
    one, two = (
        [json.loads(line) for line in (folder / n / "samples.jsonl").open()]
        for n in ("1", "2")
    )
    assert len(one) == 5 and all(len(row["completions"]) == 3 for row in one)
    for a, b in zip(one, two, strict=True):
        assert a["prompt"] == b["prompt"]
        for x, y in zip(a["completions"], b["completions"], strict=True):
            assert (x["text"], x["ended"]) == (y["text"], y["ended"])
            # Sums of float32 in another order.
            assert x["logp"] == pytest.approx(y["logp"], abs=1e-4)
    assert not list(folder.rglob(".*.unfinished"))


@pytest.mark.slow
def test_all_meshes_with_all_numbers_of_processes(tmp_path):
    run_all(tmp_path, GRID, (2, 1, 4), pairs=100)
    for name in GRID:
        for count in (2, 4):
            assert batches_of(tmp_path, name, count) == batches_of(tmp_path, name, 1)
            check_equal(tmp_path, name, count)
        check_equal(tmp_path, name, 1, of=f"{name}, moved")


@pytest.mark.slow
def test_votes_on_a_pair_do_not_depend_on_the_number_of_processes(tmp_path):
    write_records(tmp_path / "votes.jsonl", voted_records(96))
    own = {"data": tmp_path / "votes.jsonl", "heldout-fraction": 0.1}
    runs = {name: changes | own for name, changes in RUNS.items()}
    run_all(tmp_path, runs, (2, 1))
    for name in runs:
        assert batches_of(tmp_path, name, 2) == batches_of(tmp_path, name, 1)
        check_equal(tmp_path, name, 2)
        check_equal(tmp_path, name, 1, of=f"{name}, moved")


@pytest.mark.slow
def test_adapters_do_not_depend_on_the_number_of_processes(tmp_path):
    run_all(tmp_path, ADAPTERS, (2, 1))
    for name in ADAPTERS:
        assert batches_of(tmp_path, name, 2) == batches_of(tmp_path, name, 1)
        check_equal(tmp_path, name, 2)
        check_equal(tmp_path, name, 1, of=f"{name}, moved")


def test_wrong_input_ends_every_process(tmp_path):
    make_model_folder(tmp_path / "model")
    make_pairs_file(tmp_path / "pairs.jsonl")
    wrong = EIGHTHS | {"row-length": "none", "batch-size": 6}
    argv = command(tmp_path, tmp_path / "run", **wrong)
    first, second = run_processes(tmp_path, {"run": argv}, 2)
    complaints = [x for x in first[2].splitlines() if x.startswith("jaxpref: error: ")]
    assert len(complaints) == 1 and "batch_size 6" in complaints[0]
    # Without the first process the others are ended by jax.distributed, if not before.
    assert first[0] == 2 and second[0] != 0


@pytest.mark.slow
def test_answers_at_evaluations_are_those_of_one_process(tmp_path):
    """Also of a run that goes on in one process, with the first answers of two."""
    answers = {"eval-samples": 3, "eval-sample-tokens": 5}
    runs = {"answers": RUNS["packed and accumulated"] | answers}
    run_all(tmp_path, runs, (2, 1))
    read = lambda run: [
        (x["step"], x["id"], x["output"])
        for x in map(json.loads, (tmp_path / run / "samples.jsonl").open())
    ]
    assert len(read("1/answers")) == 6
    for other in ("2/answers", "1/answers, moved"):
        assert read(other) == read("1/answers")
    check_equal(tmp_path, "answers", 2)
    (*_, last) = read_metrics(tmp_path / "1" / "answers, moved" / "metrics.jsonl")
    (*_, expected) = read_metrics(tmp_path / "1" / "answers" / "metrics.jsonl")
    unseen = "eval_logps/unseen"
    assert last[unseen] == pytest.approx(expected[unseen], rel=2e-4)
