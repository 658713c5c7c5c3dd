"""A process of the run that `benchmarks.chaos` disturbs: `train` with a fault.

    python -m benchmarks.chaos_child FOLDER train --model ...

FOLDER holds the ordered list `events.json`.  After each start of the run, the next
event is injected by the process that it names.  The process first records it
(`fired-00.json`, ...), so no event occurs twice.  Events are logged on stderr as lines
of JSON, because a pipe still works if the disk is full.
"""

import contextlib
import dataclasses
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

KINDS = {
    "kill one": "SIGKILL of one process, at some moment of a step",
    "kill both": "SIGKILL of both",
    "kill while starting": "SIGKILL of one at some moment of its first seconds",
    "kill in a save": "SIGKILL of one or both while a checkpoint is half written",
    "kill in a restore": "SIGKILL of one or both while a checkpoint is read",
    "SIGTERM to one": "a preemption's notice to one process",
    "SIGTERM to both": "a preemption's notice to both",
    "truncated file": "SIGKILL of both; the newest checkpoint loses the end of a file",
    "flipped bit": "SIGKILL of both; the newest checkpoint has one wrong bit",
    "full disk": "no file of one or both may grow any more (RLIMIT_FSIZE)",
}
DAMAGES = ("truncated file", "flipped bit")
BY_STEP = {*KINDS} - {"kill while starting", "kill in a save", "kill in a restore"}
PREFIX = "chaos: "
_LIMIT = 1000  # bytes that a file may have on a full disk
_STARTING = (
    6.0  # seconds after its start in which a process may be killed while starting
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """A fault to inject after one start of the run."""

    kind: str
    """One of `KINDS`."""
    actor: int
    """The process that injects it."""
    targets: tuple[int, ...]
    """The processes that it affects."""
    after: int
    """Steps since the start before it occurs."""
    moment: float
    """In [0, 1): moment within the disturbed operation, or position in a file."""


def main(folder: Path, argv: list[str]) -> None:
    """Trains until the fault occurs."""
    index = int(os.environ["JAX_PROCESS_ID"])
    (folder / f"pid-{index}").write_text(str(os.getpid()))
    events = [
        Event(**each) for each in json.loads((folder / "events.json").read_text())
    ]
    number = len(list(folder.glob("fired-*.json")))
    out = Path(argv[argv.index("--out") + 1])
    # Before this process joins the others, and so before any of them reads.
    if index == 0 and number and events[number - 1].kind in DAMAGES:
        _damage(folder / f"damaged-{number - 1:02}.json", events[number - 1], out)
    life = _Life(folder, out, number, events[number] if number < len(events) else None)
    life.patch(mine=life.event is not None and life.event.actor == index)

    from jaxpref import cli

    sys.argv[1:] = argv
    cli.main()


class _Life:
    """Counts the steps of this process, and injects its fault."""

    def __init__(self, folder: Path, out: Path, number: int, event: Event | None):
        self.folder, self.out, self.number, self.event = folder, out, number, event
        self.index = int(os.environ["JAX_PROCESS_ID"])
        self.first = self.step = None
        self.last = time.monotonic()
        self.restoring = self.fired = False
        self.started = threading.Lock()

    def patch(self, *, mine: bool) -> None:
        """Hooks into steps, saves, and restores."""
        kind = self.event.kind if mine else ""
        if kind == "kill while starting":
            self.later(_STARTING * self.event.moment)

        from jaxpref.runtime.checkpoints import Checkpoints
        from jaxpref.runtime.late_metrics import LateMetrics

        push, save, restore = LateMetrics.push, Checkpoints.save, Checkpoints.restore

        def stepped(late, step, *args):
            self.first, self.step = self.first or step, step
            if self.index == 0:
                log({"step": step, "time": time.time(), "life": self.number})
            if self.fired and kind.startswith("SIGTERM"):
                time.sleep(0.3)  # JAX checks once per second, which should be few steps
            now = time.monotonic()
            seconds, self.last = now - self.last, now
            if kind in BY_STEP and step - self.first + 1 >= self.event.after:
                if kind not in DAMAGES or len(finished(self.out)) >= 2:
                    # Somewhere in this step or the next one.
                    self.later(2 * min(seconds, 0.2) * self.event.moment)
            return push(late, step, *args)

        def saved(checkpoints, step, *args, **kwargs):
            before = self.half_written()
            result = save(checkpoints, step, *args, **kwargs)
            if kind == "kill in a save" and step - self.first + 1 >= self.event.after:
                seen = lambda: self.half_written() - before
                self.later(0.05 * self.event.moment, seen)
            return result

        def restored(checkpoints, *args, **kwargs):
            self.restoring = True
            if kind == "kill in a restore":
                self.later(0.5 * self.event.moment)
            result = restore(checkpoints, *args, **kwargs)
            self.restoring = False
            return result

        LateMetrics.push = stepped
        Checkpoints.save, Checkpoints.restore = saved, restored

    def half_written(self) -> set[int]:
        """Inodes: one that a killed life has left may have the name of a new one."""
        found = (self.out / "checkpoints").glob("*tmp*")
        with contextlib.suppress(FileNotFoundError):
            return {folder.stat().st_ino for folder in found}
        return set()

    def later(self, seconds: float, seen: Callable[[], object] = lambda: True) -> None:
        """Injects the fault once, in a thread, after its preconditions hold."""
        if not self.started.acquire(blocking=False):
            return

        def wait():
            end = time.monotonic() + 2  # a small checkpoint may be finished too soon
            while not seen() and time.monotonic() < end:
                time.sleep(0.001)
            time.sleep(seconds)
            self.fire()

        threading.Thread(target=wait, daemon=True).start()

    def fire(self) -> None:
        """Logs the fault and injects it."""
        event = self.event
        record = {
            "event": self.number,
            "time": time.time(),
            "step": self.step,
            "unfinished": unfinished(self.out),
            "restoring": self.restoring,
        }
        (self.folder / f"fired-{self.number:02}.json").write_text(json.dumps(record))
        log(record)
        self.fired = True
        pids = [int((self.folder / f"pid-{i}").read_text()) for i in event.targets]
        # Itself last.
        for pid in sorted(pids, key=lambda pid: pid == os.getpid()):
            if event.kind == "full disk":
                _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (_LIMIT, hard))
            else:
                term = event.kind.startswith("SIGTERM")
                os.kill(pid, signal.SIGTERM if term else signal.SIGKILL)


def finished(out: Path) -> list[Path]:
    """The completed checkpoints, in order."""
    folders = (out / "checkpoints").glob("*")
    return sorted((f for f in folders if f.name.isdigit()), key=lambda f: int(f.name))


def unfinished(out: Path) -> list[str]:
    """The names of incomplete checkpoints."""
    return sorted(f.name for f in (out / "checkpoints").glob("*tmp*"))


def _damage(path: Path, event: Event, out: Path) -> None:
    """Damages a file of the newest checkpoint, once; larger files are more likely."""
    if path.exists():
        return
    newest = finished(out)[-1]
    files = sorted(f for f in newest.rglob("*") if f.is_file() and f.stat().st_size)
    sizes = [file.stat().st_size for file in files]
    rng = random.Random(event.moment)
    (file,) = rng.choices(files, sizes)
    content = bytearray(file.read_bytes())
    place = rng.randrange(len(content))
    if event.kind == "truncated file":
        del content[place:]
    else:
        content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    record = {"damaged": str(file.relative_to(out / "checkpoints")), "byte": place}
    path.write_text(json.dumps(record))
    log(record)


def log(what: Mapping[str, object]) -> None:
    """Writes a line to stderr, even after a progress bar."""
    os.write(2, f"\n{PREFIX}{json.dumps(what)}\n".encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
