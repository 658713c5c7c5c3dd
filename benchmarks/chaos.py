r"""Is a run with twenty injected faults bit-identical to an undisturbed one?

Trains a small model on preference pairs, in two processes with four virtual CPU devices
under `jaxpref.runtime.supervise`.  It trains twice: undisturbed, and with a fault after
each start, of all the kinds that `benchmarks.chaos_child` lists.  The supervisor
restarts the run; after an exit that it does not restart (a full disk), the command is
repeated.  The exported parameters and all metrics except timings must then be equal.

Command
        python -m benchmarks.inputs hh stories260k
        python -m benchmarks.chaos --kills 20 --seed 0 --json chaos.json \
            --model inputs/stories260k-hf \
            --data inputs/hh_rlhf_helpful_base_test.jsonl.gz

The seed determines the faults, their order, the process, the number of steps after a
restart, and the moment within a step.  The exact timing still depends on the machine.

Expected
    All 20 faults are injected, and both runs are bit-identical.  On two cores busy with
    other work (seed 0, 99 steps): three flipped bits and a truncated file were all
    detected; the median time from a fault to the next step was 22 seconds (13 to 49);
    570 seconds of CPU time, 21 minutes of wall-clock time.

    With `--kills 100 --seed 1 --kinds 'kill in a save' 'kill in a restore' 'kill one'
    'kill both'` (231 steps), both runs are bit-identical too.  50 of the 100 kills came
    in a save or a restore; 56 minutes on two busy cores of an Intel Xeon.
"""

import dataclasses
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from benchmarks.chaos_child import DAMAGES, KINDS, PREFIX, Event
from jaxpref.errors import InputError
from jaxpref.files import check_output, write_json
from jaxpref.runtime.entry import entry_point
from jaxpref.train import read_metrics

PROCESSES = 2
SAVE_EVERY = 2
NOTICED = 6
"""Steps until the processes agree on the step at which SIGTERM ends them."""
TIMINGS = ("tokens_per_second", "pairs_per_second", "data_wait_fraction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChaosConfig:
    """Options of this benchmark."""

    model: str
    """Model folder."""
    data: str
    """Preference file."""
    kills: int = 20
    """Number of faults."""
    seed: int = 0
    """Seed of the faults."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Kinds of faults; each occurs once before any occurs twice."""
    max_length: int = 96
    """Maximum length of prompt plus completion, in tokens."""
    max_pairs: int = 200
    """Maximum number of pairs to read."""
    patience: float = 180.0
    """Seconds without output after which a run counts as hung."""
    out: str | None = None
    """Empty folder for the runs and their log (default: a temporary one)."""
    json: str | None = None
    """JSON file for the results."""

    def __post_init__(self):
        for kind in self.kinds:
            if kind not in KINDS:
                raise InputError(f"kinds {kind!r}: is not one of {', '.join(KINDS)}")
        if self.kills < 1 or not self.kinds:
            raise InputError(
                f"kills {self.kills}, kinds {self.kinds}: at least one each"
            )
        if not {"kill one", *DAMAGES} & {*self.kinds[: self.kills]}:
            raise InputError("kinds: give kill one too, to leave something to restore")


def draw(config: ChaosConfig) -> list[Event]:
    """The faults of a seed; the first one leaves a checkpoint to restore."""
    rng = np.random.default_rng(config.seed)
    more = rng.choice(config.kinds, max(config.kills - len(config.kinds), 0)).tolist()
    kinds = [*config.kinds, *more][: config.kills]
    rng.shuffle(kinds)
    first = next(i for i, kind in enumerate(kinds) if kind in (*DAMAGES, "kill one"))
    kinds.insert(0, kinds.pop(first))
    events = []
    for kind in kinds:
        actor = int(rng.integers(PROCESSES))
        both = kind.endswith("both") or kind in DAMAGES
        if kind in ("kill in a save", "kill in a restore", "full disk"):
            both = bool(rng.integers(2))
        # At least one fault in three occurs before a new checkpoint is saved.
        after = int(rng.integers(1, 2 * SAVE_EVERY))
        event = Event(
            kind=kind,
            actor=actor,
            targets=tuple(range(PROCESSES)) if both else (actor,),
            after=SAVE_EVERY + after if kind in DAMAGES or not events else after,
            moment=float(rng.random()),
        )
        events.append(event)
    return events


def steps_for(events: Sequence[Event]) -> int:
    """A number of steps that is enough for all faults to occur."""
    at = furthest = 0
    for event in events:
        if event.kind in ("kill while starting", "kill in a restore"):
            continue
        term = event.kind.startswith("SIGTERM")
        end = at + event.after + SAVE_EVERY + NOTICED * term
        furthest = max(furthest, end)
        at = end if term else end // SAVE_EVERY * SAVE_EVERY
    return furthest + 5


def command(config: ChaosConfig, out: Path, steps: int) -> list[str]:
    """The `train` command with its options."""
    settings = {
        "model": config.model,
        "data": config.data,
        "out": out,
        "loss": "rdpo",
        "loss.flip-rate": 0.2,
        "learning-rate": 3e-4,
        "max-length": config.max_length,
        "max-pairs": config.max_pairs,
        "heldout-fraction": 0.1,
        "max-steps": steps,
        "batch-size": 8,
        "log-every": 1,
        "eval-every": 25,
        "save-every": SAVE_EVERY,
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
    }
    return ["train", *(str(x) for k, v in settings.items() for x in (f"--{k}", v))]


# ---- a run and its log -------------------------------------------------------------


class Run:
    """A run with its faults, from the first command to the last."""

    def __init__(self, config: ChaosConfig, folder: Path, events: Sequence[Event]):
        """Writes the faults to the folder in which the processes look for them.

        Args:
          config: the benchmark's options.
          folder: this run's folder, for its log and `out/`.
          events: the faults; empty for an undisturbed run.
        """
        self.config, self.folder, self.events = config, folder, events
        self.out, self.lives, self.records = folder / "out", 0, []
        folder.mkdir()
        write_json(folder / "events.json", [dataclasses.asdict(e) for e in events])

    def finish(self, steps: int, bar: tqdm) -> float:
        """Repeats the command until it succeeds; returns the seconds.

        Raises:
          InputError: if it hangs, fails without a fault, or succeeds before all faults
            have occurred.
        """
        began = time.monotonic()
        argv = [sys.executable, "-m", "benchmarks.chaos_child", str(self.folder)]
        argv += command(self.config, self.out, steps)
        while code := self._once(argv, bar):
            last = self.records[-1] if self.records else {"supervisor": None}
            if "supervisor" in last:  # each fault ends the run once
                raise InputError(f"exit code {code} without a fault; {self._tail()}")
            last["supervisor"] = code
        if len(self.records) < len(self.events):
            raise InputError(f"only {len(self.records)} of {len(self.events)} faults")
        return time.monotonic() - began

    def _once(self, argv: list[str], bar: tqdm) -> int:
        """Waits for the supervisor and returns its exit code."""
        supervised = [sys.executable, "-m", "jaxpref.runtime.supervise"]
        supervised += ["--processes", str(PROCESSES), "--pause", "0", "--grace", "10"]
        supervised += ["--restarts", str(2 * len(self.events) + 1), "--", *argv]
        process = subprocess.Popen(
            supervised,
            env=os.environ | environment(self.folder.parent),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            for line in lines_of(
                process, self.folder / "log.txt", self.config.patience
            ):
                self._note(line, bar)
            return process.wait()
        except TimeoutError as error:
            raise InputError(f"hung: {error}; {self._tail()}") from error
        finally:
            process.send_signal(signal.SIGKILL)  # which kills its children too
            process.wait()

    def _note(self, line: str, bar: tqdm) -> None:
        """Adds the contents of a log line to the record of the preceding fault."""
        if not line.startswith(PREFIX):
            # A progress bar may precede it on the line.
            found = re.search(r"(supervise: |jaxpref: |WARNING:jaxpref:).*", line)
            if self.records and found:
                self.records[-1]["log"].append(found[0])
            return
        entry = json.loads(line.removeprefix(PREFIX))
        if "event" in entry:
            event = self.events[entry.pop("event")]
            self.records.append(
                {"kind": event.kind, "targets": list(event.targets), **entry, "log": []}
            )
            bar.set_postfix_str(event.kind)
            bar.update()
        elif "step" in entry:
            # After SIGTERM, or on a full disk, processes keep running for a while, and
            # the next one may end before its first step.
            for record in self.records[: entry["life"]]:
                if "resumed_at" not in record:
                    record["resumed_at"] = entry["step"] - 1
                    record["seconds"] = round(entry["time"] - record["time"], 2)
        elif self.records:
            self.records[-1] |= entry

    def _tail(self) -> str:
        text = (self.folder / "log.txt").read_text(errors="replace")
        kept = [x for x in re.split(r"[\r\n]+", text) if x and not x.startswith(PREFIX)]
        return " | ".join(kept[-5:])


def environment(folder: Path) -> dict[str, str]:
    """Environment variables of the processes: devices, and caches that both share."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    virtual = "--xla_force_host_platform_device_count="
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if not flag.startswith(virtual)]
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*flags, f"{virtual}{8 // PROCESSES}"]),
        "JAXPREF_CACHE": str(folder / "cache"),
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def lines_of(process: subprocess.Popen, log: Path, patience: float) -> Iterator[str]:
    """Yields the output lines of a process, which are also appended to a log.

    Raises:
      TimeoutError: if there is no output for `patience` seconds.
    """
    lines: queue.Queue = queue.Queue()

    def read():
        with log.open("ab") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                lines.put(line.decode(errors="replace").rsplit("\r")[-1].strip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            raise TimeoutError(f"no output for {patience:g} s") from None
        if line is None:
            return
        yield line


# ---- results -----------------------------------------------------------------------


def differences(undisturbed: Path, disturbed: Path) -> list[str]:
    """Differences between two runs; empty if they are bit-identical."""
    weights = "export/model.safetensors"
    found = []
    if (undisturbed / weights).read_bytes() != (disturbed / weights).read_bytes():
        found.append("exported parameters")
    lines = [
        [
            {k: v for k, v in line.items() if k not in TIMINGS}
            for line in read_metrics(out / "metrics.jsonl")
        ]
        for out in (undisturbed, disturbed)
    ]
    if len(lines[0]) != len(lines[1]):
        found.append(f"{len(lines[0])} and {len(lines[1])} lines of metrics")
    wrong = [a["step"] for a, b in zip(*lines) if a != b]
    return found + ([f"metrics from step {wrong[0]} on"] if wrong else [])


def main(config: ChaosConfig) -> dict:
    """Runs both, compares them, and returns the results.

    Raises:
      InputError: if a run hung or could not be finished.
    """
    if config.json is not None:
        check_output(
            "--json", config.json, {"--model": config.model, "--data": config.data}
        )
    events = draw(config)
    steps = steps_for(events)
    record = {"config": dataclasses.asdict(config), "steps": steps}
    with tempfile.TemporaryDirectory(prefix="jaxpref-chaos-") as temporary:
        folder = Path(config.out or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        undisturbed = Run(config, folder / "undisturbed", ())
        disturbed = Run(config, folder / "disturbed", events)
        with tqdm(total=len(events), desc="events") as bar:
            bar.set_postfix_str("undisturbed run")
            record["undisturbed_seconds"] = undisturbed.finish(steps, bar)
            try:
                record["disturbed_seconds"] = disturbed.finish(steps, bar)
            finally:
                record["events"] = disturbed.records
                if config.json is not None:
                    write_json(config.json, record)
        record["differences"] = differences(undisturbed.out, disturbed.out)
    if config.json is not None:
        write_json(config.json, record)
    return record


def describe(record: dict) -> str:
    """One line per fault, and the verdict."""
    lines = []
    for number, event in enumerate(record["events"]):
        who = " and ".join(map(str, event["targets"]))
        since = f"{event['seconds']:.1f} s" if "seconds" in event else "not at all"
        lines.append(
            f"{number + 1:2} {event['kind']} (process {who}) at step {event['step']}: "
            f"resumed at {event.get('resumed_at')}, next step after {since}"
        )
        lines += [f"     {line}" for line in event["log"]]
    wrong = ", ".join(record["differences"])
    lines.append(f"differs: {wrong}" if wrong else "bit-identical")
    return "\n".join(lines)


if __name__ == "__main__":
    with entry_point():
        record = main(tyro.cli(ChaosConfig, description=__doc__))
        print(describe(record))
    sys.exit(1 if record["differences"] else 0)
