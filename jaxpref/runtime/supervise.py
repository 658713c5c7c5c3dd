"""A supervisor that restarts all processes of a run after a failure.

Usage: `python -m jaxpref.runtime.supervise -- COMMAND`.

When one process of a run dies, the others wait for it in a collective, or JAX's
coordination service aborts them (exit code 134).  None of them can restart alone.  So
the supervisor stops all processes and restarts them from their last checkpoint.  It
does not import jax, so it stays small and survives what kills its children.

A process can also hang, for example in a collective that never completes or on a file
system that does not respond.  While it trains, `jaxpref` reports each step, each
checkpoint, and each batch that it reads or scores.  If a process reports nothing for
`--hung` seconds, all are killed and restarted.  Commands that report no progress are
never considered hung.

On a pod, every worker runs one supervisor with one process, and JAX detects the others.
With `--processes N`, the N processes run on this machine and find each other through
`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, and `JAX_PROCESS_ID`.

Exit codes:
  0: every process exited with 0.
  2: invalid input, either to this command or to a process.  Not restarted, unless a
    signal killed another process.
  65: a run stopped itself because too many steps went wrong, or because nothing was
    learned.  Not restarted.
  66: a process ran out of memory.  Not restarted.
  143: the supervisor got SIGTERM and forwarded it, and every process saved its last
    step or had finished.  The same command resumes the run.
  130: the supervisor got SIGTERM or SIGINT and forwarded it; not every process saved.
  otherwise: the exit code of the first process that failed, once no restarts are left.
    128 + n stands for a process killed by signal n (137: it hung and was killed).  143
    stands for one that got SIGTERM by itself and saved its last step
    (`jaxpref.runtime.preemption`); such a process is restarted.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from jaxpref.errors import show, visible_line
from jaxpref.runtime import heartbeat

INVALID_INPUT = 2
OUT_OF_MEMORY = 66
FINAL = {
    INVALID_INPUT: "invalid input",
    65: "a run that stopped itself",
    OUT_OF_MEMORY: "a process that ran out of memory",
}
"""Exit codes after which restarting the same command is pointless."""
INTERRUPTED = 130
SAVED = 128 + signal.SIGTERM
_POLL = 0.1  # seconds between checks of the processes
_LONGEST_PAUSE = 60.0
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


class _Signaled(Exception):
    """SIGTERM or SIGINT was received; `args[0]` is its number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuperviseConfig:
    """What to start, and when to restart it."""

    command: tuple[str, ...]
    """The command and its arguments."""
    processes: int = 1
    """Copies of the command on this machine."""
    restarts: int = 3
    """How many times to restart all processes after a failure."""
    grace: float = 30.0
    """Seconds that a process has to end after SIGTERM or SIGINT, before SIGKILL."""
    pause: float = 1.0
    """Seconds before the first restart; doubled before each later one, at most 60."""
    hung: float = 1800.0
    """Seconds without progress after which a process counts as hung; 0: never.  Must be
    longer than the longest operation that reports none, such as compiling the step."""
    steady: float = 600.0
    """A failure this many seconds after the start resets the count of restarts, if a
    checkpoint was completed.  So a run that makes progress does not use them up."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command given on the command line and returns the exit code."""
    return supervise(_parse(sys.argv[1:] if argv is None else list(argv)))


def supervise(config: SuperviseConfig) -> int:
    """Runs the processes until all succeed or no restarts are left.

    Must be called from the main thread, because it handles SIGTERM and SIGINT.

    Returns:
      The exit code, as listed in the module's docstring.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise)
    processes: list[subprocess.Popen] = []
    used = 0
    try:
        while True:
            began = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="jaxpref-supervise-") as folder:
                _start(config, processes, Path(folder))
                failed = _first_failure(config, processes, Path(folder))
                if failed is None:
                    return 0
                index, hung = failed
                killed = any((process.poll() or 0) < 0 for process in processes)
                # Not SIGTERM, because saving a step needs the dead process.  A hung
                # process may never run Python's handlers, hence SIGKILL.
                number = signal.SIGKILL if hung else signal.SIGINT
                _stop(processes, number, config.grace)
                saved = any(Path(folder).glob(f"*{heartbeat.SAVED}"))
            code = processes[index].returncode
            ended = f"process {index} of {config.processes} "
            ended += hung or f"ended {_how(code)}"
            for process in processes:
                # A process that lost a peer may report that as another error, but
                # not as running out of memory.
                sure = not killed or process.returncode == OUT_OF_MEMORY
                if (what := FINAL.get(process.returncode)) and sure:
                    code = process.returncode
                    _say(f"{ended}; {what} (code {code}) is not restarted")
                    return code
            if saved and time.monotonic() - began >= config.steady:
                used = 0
            if used >= config.restarts:
                _say(f"{ended}; no restarts left of {config.restarts}")
                return code if code > 0 else 128 - code
            pause = _pause_before(used, config.pause)
            used += 1
            _say(f"{ended}; restart {used} of {config.restarts} in {pause:g} s")
            processes.clear()
            time.sleep(pause)
    except _Signaled as signaled:
        _stop(processes, signaled.args[0], config.grace)
        codes = {process.returncode for process in processes}
        if not codes or not codes <= {0, SAVED}:
            return INTERRUPTED
        return SAVED if SAVED in codes else 0
    except OSError as error:
        _stop(processes, signal.SIGKILL, config.grace)
        _say(f"error: {config.command[0]}: {error.strerror}")
        return INVALID_INPUT


def _start(
    config: SuperviseConfig, processes: list[subprocess.Popen], folder: Path
) -> None:
    """Starts the processes, appending each at once so that a signal loses none."""
    shared = {}
    if config.processes > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        shared["JAX_COORDINATOR_ADDRESS"] = f"localhost:{port}"
        shared["JAX_NUM_PROCESSES"] = str(config.processes)
    for index in range(config.processes):
        variables = shared | ({"JAX_PROCESS_ID": str(index)} if shared else {})
        variables |= {heartbeat.VARIABLE: str(folder / str(index))}
        with _signals_blocked():
            processes.append(
                subprocess.Popen(
                    config.command,
                    env=os.environ | variables,
                    # Ctrl-C reaches only the supervisor, which forwards it once.
                    start_new_session=True,
                    preexec_fn=_prepare_child,
                )
            )


@contextlib.contextmanager
def _signals_blocked():
    """Blocks signals: one between fork and append would leave an untracked process."""
    blocked = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)


def _prepare_child() -> None:
    """Makes a child die with its parent: two runs must never write to one folder."""
    if _LIBC is not None:
        _LIBC.prctl(_DEATH_SIGNAL, signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})


def _first_failure(
    config: SuperviseConfig, processes: Sequence[subprocess.Popen], folder: Path
) -> tuple[int, str] | None:
    """Waits for the first process that fails or hangs; None if all succeed.

    Returns:
      Its index, and a message about it if it hangs, else an empty string.
    """
    monitor = heartbeat.Monitor(folder, config.hung)
    while True:
        codes = [process.poll() for process in processes]
        for index, code in enumerate(codes):
            if code:
                return index, ""
        if None not in codes:
            return None
        running = [index for index, code in enumerate(codes) if code is None]
        if silent := monitor.silent(running):
            return silent
        time.sleep(_POLL)


def _stop(processes: Sequence[subprocess.Popen], number: int, grace: float) -> None:
    """Sends a signal to all running processes, then SIGKILL after the grace time."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)
    end = time.monotonic() + grace
    while any(p.poll() is None for p in processes) and time.monotonic() < end:
        time.sleep(_POLL)
    for process in processes:
        # Kill the process group as well: a process may leave children behind.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _pause_before(restart: int, first: float) -> float:
    """Seconds before a restart (from 0): doubled each time, up to the longest."""
    try:
        return min(math.ldexp(first, restart), _LONGEST_PAUSE)
    except OverflowError:  # after more than a thousand restarts
        return _LONGEST_PAUSE


def _raise(number: int, frame) -> None:
    # Further signals are ignored, because the shutdown is bounded by the grace time.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    raise _Signaled(number)


def _how(code: int) -> str:
    if code >= 0:
        return f"with code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"


def _say(line: str) -> None:
    show(visible_line(f"supervise: {line}"), file=sys.stderr)


def _parse(argv: list[str]) -> SuperviseConfig:
    split = argv.index("--") if "--" in argv else len(argv)
    options, command = argv[:split], argv[split + 1 :]
    default = SuperviseConfig(command=())
    parser = argparse.ArgumentParser(
        prog="python -m jaxpref.runtime.supervise",
        usage="%(prog)s [options] -- COMMAND...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, kind, least, what in (
        ("processes", int, 1, "copies of COMMAND on this machine"),
        ("restarts", int, 0, "how many times to restart all processes after a failure"),
        ("grace", float, 0, "seconds from SIGTERM or SIGINT to SIGKILL"),
        ("pause", float, 0, "seconds before the first restart; later ones double it"),
        ("hung", float, 0, "seconds without progress that count as hung; 0: never"),
        ("steady", float, 0, "seconds, with a checkpoint, that reset the restarts"),
    ):
        parser.add_argument(
            f"--{name}",
            type=_at_least(least, kind),
            default=getattr(default, name),
            help=f"{what} (default: %(default)s)",
        )
    parsed = parser.parse_args(options)
    if not command:
        parser.error("no COMMAND given: put it after --")
    return SuperviseConfig(command=tuple(command), **vars(parsed))


def _at_least(least: float, kind: type):
    def read(text: str):
        if not (value := kind(text)) >= least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return value

    read.__name__ = kind.__name__  # argparse uses it in the message for a non-number
    return read


if __name__ == "__main__":
    sys.exit(main())
