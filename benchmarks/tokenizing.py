r"""How long does a run take to read a large file, and how much memory?

    python -m benchmarks.tokenizing --records 10000 100000 --json tokenizing.json
    python -m benchmarks.tokenizing --records 100000 1000000 --json million.json

Makes a file of short preference records (random words; about 40 tokens each with the
tokenizer that it trains on them) and a tiny model, and times `jaxpref train` for one
step of `--loss simpo`, which needs no reference.  No pairs are held out.

"cold" runs find no tokenized records in the cache, and "warm" ones are the same command
with another output folder, as a killed run is restarted.  With several processes, these
belong to one run and share the cores of this machine.  `--own-caches` gives each its
own cache, as on hosts that share no disk; then they exchange what they tokenize.

Output
    A line for each run: `read`, the seconds of reading and tokenizing (the phase
    "tokenize" of OUT/timings.json); `first_step`, those from the start of the first
    process to the end of the step; `seconds`, of the whole command, from its start in
    the shell to the export; `cpu_seconds` of all processes; and `peak_mib`, their
    resident memory together.  Pages that processes share count once for each.  The last
    lines are the bytes of memory by which `peak_mib` grows with each further record.
"""

import dataclasses
import json
import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.peers.processes import measured
from benchmarks.step import ROOT, machine
from jaxpref.errors import InputError, show
from jaxpref.files import check_output, write_json
from jaxpref.models import build
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.models.folder import save
from jaxpref.runtime.entry import entry_point

SEED = 0
WORDS, LETTERS = 5_000, "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = 4_096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this benchmark."""

    json: str
    """File for the results."""
    records: tuple[int, ...] = (10_000, 100_000)
    """Numbers of records."""
    processes: tuple[int, ...] = (1, 4)
    """Numbers of processes of a run."""
    own_caches: bool = False
    """Whether each process has a cache of its own."""
    rounds: int = 1
    """Cold and warm runs of each kind."""


def main(options: Options) -> None:
    """Measures; results are written after each run."""
    check_output("--json", options.json, {})
    results = {"machine": machine(), "options": dataclasses.asdict(options), "runs": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        for count in options.records:
            file = folder / f"{count}.jsonl"
            write_records(file, count)
            for processes in options.processes:
                for number in range(options.rounds):
                    work = folder / f"{count}-{processes}-{number}"
                    for caches in ("cold", "warm"):
                        found = {
                            "records": count,
                            "processes": processes,
                            "caches": caches,
                            **_run(folder, file, work, caches, processes, options),
                        }
                        results["runs"].append(found)
                        write_json(options.json, results)
                        show(json.dumps(found))
            file.unlink()
    results["bytes_per_record"] = bytes_per_record(results["runs"])
    write_json(options.json, results)
    for name, size in results["bytes_per_record"].items():
        show(f"{name}: {size:,} bytes of memory per record")


def bytes_per_record(runs: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Bytes of peak memory per further record, by kind of run, of several sizes.

    Least squares; empty if all runs have as many records.
    """
    kinds: dict[str, list[tuple[int, float]]] = {}
    for run in runs:
        name = f"{run['processes']} processes, {run['caches']}"
        kinds.setdefault(name, []).append((run["records"], run["peak_mib"]))
    return {
        name: round(float(np.polyfit(*zip(*found), 1)[0]) * 2**20)
        for name, found in kinds.items()
        if len({records for records, _ in found}) > 1
    }


def _run(
    folder: Path,
    file: Path,
    work: Path,
    name: str,
    processes: int,
    options: Options,
) -> dict[str, float]:
    """One run of `jaxpref train`, of one or several processes."""
    out = work / name
    work.mkdir(exist_ok=True)
    train = [
        *(sys.executable, "-m", "jaxpref", "train", "--loss", "simpo"),
        *("--model", folder / "model", "--data", file, "--out", out),
        *("--max-steps", 1, "--batch-size", 32, "--max-length", 128),
        *("--heldout-fraction", 0),
    ]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    commands = []
    for index in range(processes):
        cache = work / (f"cache{index}" if options.own_caches else "cache")
        own = ["env", f"JAXPREF_CACHE={cache}", *train]
        if processes > 1:
            own += ["--coordinator", f"localhost:{port}"]
            own += ["--processes", processes, "--process-id", index]
        commands.append(shlex.join(map(str, own)))
    # The first process ends last.
    line = "".join(f"{command} & " for command in commands[1:]) + commands[0]
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    with (work / f"{name}.log").open("w+") as log:
        result = measured(
            ["bash", "-c", line + "; code=$?; wait; exit $code"], environ, log
        )
        if result.code:
            log.seek(0)
            raise InputError(f"the run failed ({result.code}): {log.read()[-500:]}")
    phases = json.loads((out / "timings.json").read_text())
    return {
        "read": round(phases["tokenize"], 1),
        "first_step": round(sum(phases.values()) - phases["export"], 1),
        "seconds": round(result.seconds, 1),
        "cpu_seconds": round(result.cpu_seconds, 1),
        "peak_mib": round(result.peak_mib),
    }


def texts(count: int) -> Iterator[tuple[str, str, str]]:
    """Prompts with two answers, of random words, frequent ones short."""
    rng = np.random.default_rng(SEED)
    letters = np.array(list(LETTERS))
    sizes = np.sort(rng.integers(2, 11, WORDS))
    words = np.array(["".join(rng.choice(letters, size)) for size in sizes])
    for start in range(0, count, 10_000):
        lengths = rng.integers((4, 5, 5), (16, 20, 20), (min(10_000, count - start), 3))
        chosen = words[(WORDS * rng.random(lengths.sum()) ** 3).astype(int)].tolist()
        ends = np.cumsum(lengths).reshape(-1, 3)
        for (a, b, c), (first, second, end) in zip(lengths.tolist(), ends.tolist()):
            parts = chosen[first - a : first], chosen[second - b : second]
            yield *map(" ".join, parts), " ".join(chosen[end - c : end])


def write_records(path: Path, count: int) -> None:
    """Writes a file of records."""
    with path.open("w") as file:
        for prompt, chosen, rejected in texts(count):
            row = {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}
            file.write(json.dumps(row) + "\n")


def write_model(folder: Path) -> None:
    """Writes a Llama of 140 thousand weights, and a byte-level BPE tokenizer."""
    import jax
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((" ".join(row) for row in texts(10_000)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    model = build(
        LlamaArchitecture(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            head_dim=4,
            max_position_embeddings=128,
        )
    )
    save(folder, model, jax.jit(model.init)(jax.random.key(SEED)))


if __name__ == "__main__":
    with entry_point():
        main(tyro.cli(Options, description=__doc__))
