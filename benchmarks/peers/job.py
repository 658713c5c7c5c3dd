"""Input and output of one process of `benchmarks.step`.

Uses only the standard library, because it runs in the environment of every system.
"""

import dataclasses
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

RATE_SIZE = 2048
"""Rows and columns of the matrices whose product is timed."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One process: `warmup` steps that are not timed, then `steps` that are."""

    mode: str
    """"train" times steps, "rate" matrix products."""
    threads: int
    model: str = ""
    """Hugging Face folder with float32 weights, which the reference shares."""
    pairs: str = ""
    """JSON list of [prompt, chosen, rejected] token ids, in the order of the steps."""
    batch_size: int = 8
    """Pairs per step."""
    warmup: int = 1
    steps: int = 4
    repeat: bool = False
    """Whether every step repeats the first batch, to compare losses."""
    prompt_length: int = 512
    """Maximum tokens of a prompt, to which a system with fixed lengths pads."""
    response_length: int = 512
    """Maximum tokens of an answer."""
    micro_batch: int = 0
    """Pairs per micro-batch of a system with fixed lengths; 0 means all."""
    row_length: int = 0
    """Tokens of a packed row; 0: of the longest pair, -1: one pair per row."""
    learning_rate: float = 1e-6
    beta: float = 0.1
    max_grad_norm: float = 1.0


@dataclasses.dataclass
class Steps:
    """The measurements of each step, including the warm-up."""

    losses: list[float] = dataclasses.field(default_factory=list)
    """Mean loss of each step's pairs, before the update."""
    grad_norms: list[float] = dataclasses.field(default_factory=list)
    """Global gradient norm of each step, before clipping."""
    ends: list[float] = dataclasses.field(default_factory=list)
    """Clock at the start of training and at the end of each step."""
    pairs: list[list[int]] = dataclasses.field(default_factory=list)
    """Indices in the file of each step's pairs, for timed steps only."""


def read_job() -> tuple[Job, Path]:
    """The job in the file that is the first argument, and the file for the results."""
    source, out = sys.argv[1:]
    return Job(**json.loads(Path(source).read_text("utf-8"))), Path(out)


def read_pairs(job: Job) -> list[list[list[int]]]:
    """The pairs of all steps, warm-up first; with `repeat`, those of one batch."""
    pairs = json.loads(Path(job.pairs).read_text("utf-8"))
    if job.repeat:
        pairs = pairs[: job.batch_size] * (job.warmup + job.steps)
    return pairs


def in_order(job: Job) -> list[list[int]]:
    """Indices of each timed step's pairs in a system that takes them in order."""
    first = job.warmup * job.batch_size
    starts = range(first, first + job.steps * job.batch_size, job.batch_size)
    return [[*range(start, start + job.batch_size)] for start in starts]


def write_steps(out: Path, job: Job, steps: Steps, packages: list[str]) -> None:
    """Writes seconds, losses, and pairs of the timed steps, and the peak memory."""
    seconds = [end - start for start, end in zip(steps.ends, steps.ends[1:])]
    found = {
        "seconds": seconds[job.warmup :],
        "losses": steps.losses[job.warmup :],
        "grad_norms": steps.grad_norms[job.warmup :],
        "pairs": steps.pairs,
        "warmup_seconds": seconds[: job.warmup],
        "peak_mib": peak_mib(),
        "versions": {name: version(name) for name in packages},
    }
    out.write_text(json.dumps(found), encoding="utf-8")


def write_rate(out: Path, product: Callable[[], object], *, repeats: int = 15) -> None:
    """Writes the median FLOP/s of a product of two square matrices."""
    product()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - started)
    rate = 2 * RATE_SIZE**3 / statistics.median(seconds)
    out.write_text(json.dumps({"rate": rate}), encoding="utf-8")


def peak_mib() -> float:
    """The peak memory of this process in MiB."""
    try:
        # On Linux, `ru_maxrss` still includes the process that started this one.
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        (line,) = (line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    except OSError:
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
