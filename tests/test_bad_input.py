"""Bad input, by the command line: one clear line, exit code not 0, and nothing lost."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpref import cli
from jaxpref.runtime.entry import entry_point
from jaxpref.train import read_metrics
from tests.tiny import make_model_folder, make_pairs_file, tiny_config

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["--max-new-tokens", "8"]
PADDED = ["--row-length", "none"]


class Inputs:
    """A folder with a model and pairs that work, to spoil one thing at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model, self.data = folder / "model", folder / "pairs.jsonl"
        self.out = folder / "run"

    def train(self, *options, **changes) -> list[str]:
        """The command that works, with options added and changed."""
        typed = {str(word)[2:] for word in options if str(word).startswith("--")}
        settings = {
            "model": self.model,
            "data": self.data,
            "out": self.out,
            "max-length": 64,
            "max-prompt-length": 32,
            "heldout-fraction": 0.2,
            "max-steps": 4,
            "batch-size": 8,
            "eval-every": 2,
            "save-every": 2,
            "log-every": 1,
            "mesh.data": 2,
            "mesh.tensor": 2,
        } | {name.replace("_", "-"): value for name, value in changes.items()}
        flags = [
            part
            for name, value in settings.items()
            if name not in typed
            for part in (f"--{name}", str(value))
        ]
        return ["train", *flags, *map(str, options)]

    def tensors(self) -> dict[str, np.ndarray]:
        return load_file(self.model / "model.safetensors")

    def write_tensors(self, tensors: dict[str, np.ndarray]) -> None:
        path = self.model / "model.safetensors"
        path.unlink()  # it may still be mapped
        contiguous = {name: np.array(value) for name, value in tensors.items()}
        save_file(contiguous, path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Inputs:
    """Never spoiled; copied for each test."""
    inputs = Inputs(tmp_path_factory.mktemp("sound"))
    make_model_folder(inputs.model)
    make_pairs_file(inputs.data)
    return inputs


@pytest.fixture
def inputs(sound, tmp_path) -> Inputs:
    shutil.copytree(sound.folder, tmp_path, dirs_exist_ok=True)
    return Inputs(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, sound) -> Inputs:
    """Inputs with a run of four steps, never spoiled either."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(sound.folder, folder, dirs_exist_ok=True)
    inputs = Inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["jaxpref", *inputs.train()])
        cli.main()
    return inputs


@pytest.fixture
def resumable(finished) -> Inputs:
    """The finished run under its own name; what a test spoils is put back."""
    backup = finished.folder.with_suffix(".backup")
    shutil.copytree(finished.folder, backup)
    yield finished
    shutil.rmtree(finished.folder)
    backup.rename(finished.folder)


@pytest.fixture
def refuse(monkeypatch, capfd):
    """Runs a command line in this process and returns its one line of complaint."""

    def run(argv: list[str], *fragments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["jaxpref", *argv])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert exit.value.code not in (0, None)
        return the_complaint(capfd.readouterr().err, *fragments)

    return run


def the_complaint(err: str, *fragments: str, tracebacks: bool = False) -> str:
    """The one line `jaxpref: error: ...`, which must be the last one.

    With `tracebacks`, other threads write too, and its start may share their line.
    """
    assert tracebacks or "Traceback" not in err
    lines = [line for line in err.splitlines() if line.strip()]
    complaints = re.findall("jaxpref: error: .*", err)
    assert len(complaints) == 1, err
    assert tracebacks or lines[-1] == complaints[0], err
    for fragment in fragments:
        assert fragment in complaints[0], complaints[0]
    return complaints[0]


# ---- preference files: the complaint names file, row and field ----------------------

RECORDS = {
    "not JSON": (b'{"prompt": "a", "chosen', ["not JSON"]),
    "no object": (b'["a", "b"]', ["a list"]),
    "wrong field": (b'{"prompt": "a", "chosn": "b", "rejected": "c"}', ["'chosen'"]),
    "null": (b'{"prompt": "a", "chosen": null, "rejected": "c"}', ["'chosen'", "null"]),
    "wrong type": (b'{"prompt": "a", "chosen": "b", "rejected": 7}', ["'rejected'"]),
    "empty": (b'{"prompt": "a", "chosen": "b", "rejected": " "}', ["'rejected'"]),
    "role": (
        b'{"chosen": [{"role": "bot", "content": "a"}], "rejected": []}',
        ["'chosen'", "message 1", "role"],
    ),
    "flip": (
        b'{"prompt": "a", "chosen": "b", "rejected": "c", "flip": "yes"}',
        ["'flip'"],
    ),
    "not UTF-8": (b'{"prompt": "caf\xe9", "chosen": "b"}', ["0xe9", "UTF-8"]),
    "10 MB line": (
        b'{"prompt": "%s", "chosen": "b", "rejected": "c"}' % (b"a " * 5_000_000),
        ["'prompt'", "10,000,000 characters"],
    ),
    "endless nesting": (b"[" * 100_000, ["JSON"]),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_wrong_record(inputs, refuse, name):
    record, fragments = RECORDS[name]
    lines = inputs.data.read_bytes().splitlines()
    lines[4] = record
    inputs.data.write_bytes(b"\n".join(lines))
    refuse(inputs.train(), f"{inputs.data} row 5", *fragments)
    assert not (inputs.out / "config.json").exists()


def test_no_file(inputs, refuse):
    refuse(inputs.train(data=inputs.folder / "none.jsonl"), "none.jsonl", "no such")


def test_an_empty_file(inputs, refuse):
    inputs.data.write_bytes(b"")
    refuse(inputs.train(), str(inputs.data), "no records")


def test_a_truncated_gz(inputs, refuse):
    path = inputs.data.with_suffix(".jsonl.gz")
    whole = gzip.compress(inputs.data.read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    refuse(inputs.train(data=path), str(path), "ends too early")


def test_chosen_equals_rejected_everywhere(inputs, refuse):
    record = json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"})
    inputs.data.write_text(f"{record}\n" * 5)
    refuse(inputs.train(), str(inputs.data), "no record is left", "identical 5")


def test_no_pair_to_train_on(inputs, refuse):
    refuse(inputs.train(heldout_fraction=1.0), str(inputs.data), "--heldout-fraction")


# ---- model folders: the complaint names the folder and the tensor -------------------


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
    refuse(argv, f"token {size}", f"{size} rows", "prompt 1" * (command == "sample"))
    if command != "sample":
        refuse(argv, f"{inputs.data} row 10")


def test_max_length_beyond_the_positions(inputs, refuse):
    inputs.data.write_text("not read")
    refuse(inputs.train(max_length=300), "max_length 300", "128 positions", "--max-l")


def test_a_reference_of_another_size(inputs, refuse):
    other = inputs.folder / "other"
    make_model_folder(other, num_layers=1)
    refuse(inputs.train(reference=other), str(other), "the same architecture")


# ---- the command line ---------------------------------------------------------------


def test_an_unknown_command(refuse):
    refuse(["trian"], "trian: no such command; did you mean train?", "sample")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--learning-rat", 1], ["--learning-rat:", "mean --learning-rate?"]),
        (
            ["--loss", "ipo", "--loss.label-smoothing", 0.1],
            ["--loss.label-smoothing:", "--loss ipo has no such option"],
        ),
        (["--loss", "rdpo"], ["--loss rdpo: needs --loss.flip-rate"]),
        (
            ["--loss", "rdpo", "--loss.fliprate", 0.1],
            ["did you mean --loss.flip-rate?"],
        ),
        (["--prior-right", 0.1, "--objective", "em"], ["--objective.prior-right?"]),
        (["--loss.beta", "much"], ["--loss.beta much: expected FLOAT"]),
        (["--loss.beta"], ["--loss.beta: expected a value after it: FLOAT"]),
        (["--compute-dtype", "int8"], ["--compute-dtype int8: ", "bfloat16"]),
        (["--decay", "cosin"], ["--decay cosin: ", "did you mean cosine?"]),
        (["--drop-empty", "yes"], ["--drop-empty yes: takes no value"]),
        (["--drop-empty", "--no-drop-empty"], ["--drop-empty: ", "--no-drop-empty"]),
        (["--loss", "rdop"], ["--loss rdop: no such loss; did you mean rdpo?"]),
        (
            ["--objective", "learnt_rate"],
            ["--objective learnt_rate: ", "did you mean learned_rate?"],
        ),
        (
            ["--loss", "sft", "--objective", "em"],
            ["--objective em: sft has its own objective"],
        ),
        (["--data", "a", "--data", "b"], ["--data: given more than once"]),
        (["--max_steps", 3], ["--max-steps: given more than once"]),
        (["--seed", 1, "--seed=2"], ["--seed: given more than once"]),
    ],
)
def test_options_that_the_parser_refuses(inputs, refuse, options, fragments):
    refuse(inputs.train(*options), *fragments)
    assert not inputs.out.exists()


def test_a_word_that_belongs_to_no_option(refuse):
    refuse(["train", "pairs.jsonl"], "pairs.jsonl: expected an option")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--loss", "zzz"], ["--loss zzz", "one of", "rdpo"]),
        (["--loss"], ["--loss"]),
        (["--loss", "rdpo", "--loss.flip-rate", 0.7], ["rdpo", "flip_rate", "0.7"]),
        (["--loss.beta", 0], ["dpo", "beta"]),
        (["--loss.beta", "nan"], ["dpo", "beta"]),
        (["--inject.flip-rate", 1.5], ["inject.flip_rate 1.5"]),
        (["--learning-rate", "inf"], ["learning_rate inf"]),
        (["--adam-b1", 1.0], ["adam_b1 1.0"]),
        (["--max-steps", 0], ["max_steps 0"]),
        (["--max-prompt-length", 100], ["max_prompt_length 100", "max_length 64"]),
        ([*PADDED, "--batch-size", 6], ["batch_size 6", "4 devices"]),
        (["--accumulation", 3], ["batch_size 8", "accumulation 3"]),
        (
            [*PADDED, "--accumulation", 4],
            ["batch_size 8", "accumulation 4", "4 devices"],
        ),
        (["--mesh.fsdp", 3], ["data=2 x fsdp=3 x tensor=2", "8 device"]),
        (
            ["--mesh.tensor", 8, "--mesh.data", 1, "--mesh.fsdp", 1],
            ["tensor=8", "num_kv_heads"],
        ),
    ],
)
def test_options_out_of_range(inputs, refuse, options, fragments):
    refuse(inputs.train(*options), *fragments)
    assert not (inputs.out / "config.json").exists()  # OUT is still free


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ([], ["--prompts", "--data"]),
        (["--prompts", "a", "--data", "b.jsonl"], ["--prompts", "--data"]),
        (["--prompts", "a", "--max-new-tokens", 500], ["prompt 1", "128 positions"]),
        (["--prompts", "a", "--max-new-tokens", 0], ["max_new_tokens 0"]),
        (["--prompts", "a", *SHORT, "--batch-size", 3], ["batch of 3 prompts"]),
        (["--prompts", "a", *SHORT, "--top-p", 0], ["top_p"]),
        (["--prompts", "a", *SHORT, "--temperature", -1], ["temperature"]),
    ],
)
def test_sample_options(inputs, refuse, options, fragments):
    argv = ["sample", "--model", inputs.model, *options]
    refuse([str(part) for part in argv], *fragments)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--beta", 0], ["beta 0"]),
        (["--batch-size", 9], ["batch_size 9", "8 devices"]),
        (["--reference", "/none"], ["/none", "no such folder"]),
        (["--out", "/dev/null/out"], ["/dev/null/out"]),
    ],
)
def test_evaluate_options(inputs, refuse, options, fragments):
    given = {"model": inputs.model, "data": inputs.data, "out": inputs.out}
    given |= {option[2:]: value for option, value in zip(options[::2], options[1::2])}
    argv = [part for name, value in given.items() for part in (f"--{name}", value)]
    refuse(["evaluate", *map(str, argv)], *fragments)


# ---- OUT: nothing that was written is lost ------------------------------------------


def test_out_is_a_file(inputs, refuse):
    inputs.out.write_text("precious")
    refuse(inputs.train(), f"--out {inputs.out}")
    assert inputs.out.read_text() == "precious"


def test_out_cannot_be_written(inputs, refuse):
    if not Path("/proc/self").exists():
        pytest.skip("no folder here that even the administrator cannot write to")
    refuse(inputs.train(out="/proc/run"), "--out /proc/run")


def test_a_wrong_option_does_not_bind_out(inputs, refuse):
    refuse(inputs.train(*PADDED, "--batch-size", 6), "batch_size 6")
    # Not "changed: batch_size".
    refuse(inputs.train(*PADDED, "--batch-size", 7), "batch_size 7")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--batch-size", 16, "--seed", 1], ["batch_size (8 -> 16)", "seed (0 -> 1)"]),
        (["--loss", "ipo"], ["loss", "dpo", "ipo"]),
    ],
)
def test_another_config(finished, refuse, options, fragments):
    before = fingerprint(finished.out)
    refuse(finished.train(*options), str(finished.out), *fragments)
    assert fingerprint(finished.out) == before


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"", b"null and void"])
def test_a_damaged_config_json(resumable, refuse, content):
    (resumable.out / "config.json").write_bytes(content)
    before = fingerprint(resumable.out)
    refuse(resumable.train(), f"{resumable.out}/config.json")
    assert fingerprint(resumable.out) == before


def test_other_data(resumable, refuse):
    make_pairs_file(resumable.data, seed=1)
    before = fingerprint(resumable.out / "checkpoints")
    refuse(resumable.train(), str(resumable.data), "pairs have changed")
    assert fingerprint(resumable.out / "checkpoints") == before


def test_no_checkpoint_that_can_be_restored(resumable, refuse):
    damaged = [*(resumable.out / "checkpoints").rglob("meta/metadata")]
    assert len(damaged) == 2
    for path in damaged:
        path.write_bytes(b"\0" * 10)
    refuse(resumable.train(), "checkpoints", "[4, 2]", "move the folder away")
    assert (resumable.out / "export" / "model.safetensors").exists()


def test_damaged_reference_log_probs_are_made_anew(resumable, monkeypatch, tmp_path):
    shards = sorted((resumable.out / "reference").rglob("*.safetensors"))
    before = [path.read_bytes() for path in shards]
    assert len(shards) == 2
    shards[0].write_bytes(before[0][:200])
    shards[1].write_bytes(b"PK\x03\x04 torn")
    monkeypatch.setenv("JAXPREF_CACHE", str(tmp_path))  # nor does any other run know
    monkeypatch.setattr(sys, "argv", ["jaxpref", *resumable.train()])
    cli.main()
    assert [path.read_bytes() for path in shards] == before


def test_a_run_killed_before_its_export_only_exports(resumable, monkeypatch):
    weights = resumable.out / "export" / "model.safetensors"
    before = weights.read_bytes()
    lines = read_metrics(resumable.out / "metrics.jsonl")
    shutil.rmtree(resumable.out / "export")
    (resumable.out / ".export.partial").mkdir()  # what a kill may leave behind
    monkeypatch.setattr(sys, "argv", ["jaxpref", *resumable.train()])
    monkeypatch.setattr("jaxpref.data.feed.Feed.draw", None)  # no step is made
    cli.main()
    assert weights.read_bytes() == before
    assert read_metrics(resumable.out / "metrics.jsonl") == lines
    assert not (resumable.out / ".export.partial").exists()


def test_ten_steps_in_a_row_that_are_not_finite(inputs, refuse):
    argv = inputs.train(max_steps=40, learning_rate=1e38, max_grad_norm=0)
    refuse(argv, "10 bad steps in a row", "step 10", "--learning-rate")
    lines = read_metrics(inputs.out / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 10)]
    # None was good, so none was saved.
    assert not list((inputs.out / "checkpoints").iterdir())
    assert (inputs.out / "stopped" / "step_10.json").exists()


def fingerprint(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ---- disk full and signals: in a process of their own -------------------------------

STRUCK = """
import os, resource, signal, sys
# A test run in the background of a shell ignores SIGINT, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, sys.argv[1])
import tests.conftest
from jaxpref import cli
from jaxpref.data.feed import Feed

blow, at_batch = sys.argv[2], int(sys.argv[3])
sys.argv[1:] = sys.argv[4:]
take, taken = Feed.draw, 0

def struck(feed, *state):
    global taken
    taken += 1
    if taken == at_batch and blow == "disk full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    elif taken == at_batch:
        os.kill(os.getpid(), signal.Signals[blow])
    return take(feed, *state)

Feed.draw = struck
cli.main()
"""


@pytest.mark.parametrize(
    ("blow", "code", "fragment"),
    [
        ("disk full", 2, "be written"),
        ("SIGINT", 130, "interrupted; the same command resumes"),
    ],
)
def test_a_run_that_is_struck_resumes(
    inputs, finished, monkeypatch, blow, code, fragment
):
    arguments = [str(ROOT), blow, "4", *inputs.train()]
    struck = subprocess.run(
        [sys.executable, "-c", STRUCK, *arguments],
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert struck.returncode == code, struck.stderr
    # The threads of tensorstore print tracebacks of their own where a write fails.
    the_complaint(struck.stderr, fragment, tracebacks=blow == "disk full")
    kept = {p.name for p in (inputs.out / "checkpoints").iterdir()} & {"2", "4"}
    assert kept == {"2"} or (blow == "disk full" and not kept)
    assert not (inputs.out / "export").exists()
    monkeypatch.setattr(sys, "argv", ["jaxpref", *inputs.train()])
    cli.main()
    found, expected = (
        [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
        for run in (inputs.out, finished.out)
    )
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == b["loss"]


def test_no_room_for_a_checkpoint(inputs, refuse, monkeypatch):
    usage = shutil.disk_usage(inputs.folder)
    full = usage._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    refuse(inputs.train(), "checkpoints", "bytes needed, 1,000 free", "to start again")


def test_other_weights_on_resume(inputs, refuse):
    struck = [str(ROOT), "SIGINT", "4", *inputs.train()]
    command = [sys.executable, "-c", STRUCK, *struck]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    make_model_folder(inputs.folder / "model", seed=1)
    refuse(inputs.train(), "weights have changed", "another --out")


@pytest.mark.parametrize("option", ["param_dtype", "compute_dtype"])
def test_float64_where_jax_has_none(inputs, refuse, option):
    refuse(inputs.train(**{option: "float64"}), "JAX_ENABLE_X64=1")


def test_a_bucket_as_out(inputs, refuse):
    refuse(inputs.train(out="gs://bucket/run"), "--out gs://bucket/run", "mount")
    assert not Path("gs:").exists()


@pytest.mark.parametrize("number, code", [(5, 1), (107, 1), (28, 2), (13, 2)])
def test_what_may_pass_is_tried_again(capsys, number, code):
    """The supervisor restarts after code 1, and not after 2."""
    with pytest.raises(SystemExit) as ended, entry_point():
        raise OSError(number, os.strerror(number), "bucket/file")
    assert ended.value.code == code
    assert f"bucket/file: {os.strerror(number)}" in capsys.readouterr().err
