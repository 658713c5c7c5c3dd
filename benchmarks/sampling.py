r"""How many tokens per second do the sampler and `transformers` generate?

Both systems answer the same prompts greedily, with the same weights in float32, on the
same cores.  Each run is a process of its own, for all cases; the systems take turns.

Cases
    fixed: every answer has --longest tokens.
    mixed: the length of each answer is drawn uniformly from --shortest to --longest.
    transformers answers batches of --batch-size prompts and waits for the longest
    answer of each.  jaxpref refills a slot as soon as its answer has ended.

Commands
        python -m benchmarks.inputs stories260k smollm2
        python -m benchmarks.sampling --model inputs/stories260k-hf --json sampling.json
        python -m benchmarks.sampling --model inputs/SmolLM2-135M-Instruct \
            --json sampling.json

Output
    `runs`: one record per process, with `tokens` (of the answers), `seconds` (wall
    clock) and `cpu_seconds` (over all cores, and less sensitive to other load) of a
    pass over the prompts, and `same`: the share of answers that are equal to those of
    the first system in the same round.  Rounding decides between two tokens
    that are equally likely, so it may be below 1.  jaxpref compiles in a first pass,
    whose times are `cold_seconds` and `cold_cpu_seconds`; transformers answers two
    tokens first.
    `medians`: tokens per second of wall-clock time and per CPU second, over rounds.
    A system that cannot be run is listed in `missing`.
"""

import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.peers.environments import Missing, python_of
from benchmarks.step import ROOT, cores, machine, made
from jaxpref.errors import InputError
from jaxpref.files import check_output, write_json
from jaxpref.models.folder_config import read_architecture
from jaxpref.runtime.entry import entry_point

SCRIPTS = {"jaxpref": "run_sampling.py", "torch": "run_generate.py"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the benchmark."""

    model: str
    """Hugging Face folder."""
    json: str
    """File for the results."""
    cases: str = "fixed,mixed"
    """Cases, separated by commas."""
    systems: str = "jaxpref,torch"
    """Systems, separated by commas."""
    prompts: int = 128
    """Number of prompts, of random tokens."""
    samples: int = 1
    """Answers to each prompt."""
    prompt_tokens: tuple[int, int] = (8, 64)
    """Minimum and maximum number of tokens of a prompt."""
    shortest: int = 8
    """Minimum number of tokens of an answer in the case `mixed`."""
    longest: int = 256
    """Maximum number of tokens of an answer."""
    threads: int = dataclasses.field(default_factory=cores)
    """Cores that a process may use.  On a machine with other load, CPU seconds of one
    core are the most reliable, since threads that wait for each other use CPU time."""
    batch_size: int = 32
    """Answers in progress."""
    rounds: int = 3
    """Runs of each system and case."""
    venvs: str = ".bench"
    """Folder of the peers' environments, which are made if they are missing."""
    torch_python: str | None = None
    """Interpreter with torch and transformers to use instead."""


def job_of(options: Options, round: int) -> dict[str, Any]:
    """The prompts, and for each case the number of tokens of each answer."""
    rng = np.random.default_rng(round)
    vocabulary = read_architecture(Path(options.model)).vocab_size
    first, last = options.prompt_tokens
    lengths = rng.integers(first, last + 1, options.prompts)
    answers = options.prompts * options.samples
    drawn = rng.integers(options.shortest, options.longest + 1, answers)
    drawn[0] = options.longest
    limits = {"fixed": np.full_like(drawn, options.longest), "mixed": drawn}
    cases = options.cases.split(",")
    if not set(cases) <= set(limits):
        raise InputError(f"--cases {options.cases}: the cases are fixed and mixed")
    prompts = [rng.integers(3, vocabulary, n).tolist() for n in lengths]
    return {
        "model": options.model,
        "prompts": [prompt for prompt in prompts for _ in range(options.samples)],
        "cases": {case: limits[case].tolist() for case in cases},
        "batch_size": options.batch_size,
        "threads": options.threads,
    }


def run(job: dict[str, Any], system: str, python: str, folder: Path) -> dict[str, Any]:
    """The result of one process.

    Raises:
      Missing: if it fails.
    """
    source, out = folder / "job.json", folder / "out.json"
    source.write_text(json.dumps(job), encoding="utf-8")
    out.unlink(missing_ok=True)
    script = ROOT / "benchmarks" / "peers" / SCRIPTS[system]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [python, str(script), str(source), str(out)]
    mine = sorted(os.sched_getaffinity(0))[: job["threads"]]
    bind = functools.partial(os.sched_setaffinity, 0, mine)
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, preexec_fn=bind
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise Missing(f"exit code {done.returncode}: {last[0]}"[:300])
    return json.loads(out.read_text("utf-8"))


def medians(runs: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Tokens per second by case and system."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for case, system in dict.fromkeys((x["case"], x["system"]) for x in runs):
        mine = [x for x in runs if (x["case"], x["system"]) == (case, system)]
        found.setdefault(case, {})[system] = {
            f"tokens_per_{unit}": statistics.median(
                x["tokens"] / x[f"{unit}s"] for x in mine
            )
            for unit in ("second", "cpu_second")
        }
    return found


def main(options: Options) -> None:
    """Measures round by round; results are written after each process."""
    check_output("--json", options.json, {"--model": made(options.model, "model")})
    written: dict[str, Any] = {
        "machine": machine(),
        "options": dataclasses.asdict(options),
        "runs": [],
        "missing": [],
    }
    pythons = {}
    for system in options.systems.split(","):
        try:
            given = options.torch_python if system == "torch" else None
            pythons[system] = python_of(system, Path(options.venvs), given)
        except Missing as reason:
            written["missing"].append({"system": system, "reason": str(reason)})
    with tempfile.TemporaryDirectory() as folder:
        for round in range(options.rounds):
            job, ours = job_of(options, round), {}
            for system, python in pythons.items():
                try:
                    found = run(job, system, python, Path(folder))
                except Missing as reason:
                    entry = {"system": system, "reason": str(reason)}
                    written["missing"].append(entry)
                    continue
                for case, record in found["cases"].items():
                    answers = record.pop("answers")
                    ours.setdefault(case, answers)
                    same = [a == b for a, b in zip(answers, ours[case], strict=True)]
                    record |= {"case": case, "round": round, "system": system}
                    record["tokens"] = sum(map(len, answers))
                    record["same"] = float(np.mean(same))
                    written["runs"].append(record | {"versions": found["versions"]})
                    print(json.dumps(record), file=sys.stderr, flush=True)
                written["medians"] = medians(written["runs"])
                write_json(options.json, written)
    print(json.dumps(written.get("medians"), indent=2))


if __name__ == "__main__":
    with entry_point():
        main(tyro.cli(Options, description=__doc__))
