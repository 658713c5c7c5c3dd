"""A parent that restarts a run as a whole.

Usage: `python -m jaxpref.runtime.supervise -- COMMAND`.

When one process of a run dies, the others wait for it in a collective or are aborted by
JAX's own service (exit code 134), and none of them can begin again alone.  So all are
stopped and started again, and go on from their last checkpoint.  Nothing here imports
jax: the parent stays small, and outlives what kills its children.

A process can also hang: a collective that never ends, a file system that does not
answer.  While it trains, `jaxpref` tells the supervisor of each step, checkpoint, and
batch that it scores or reads; if one tells of nothing for `--hung` seconds, all are
killed and started again.  Other commands tell nothing, and are waited for.

On a pod every worker runs one supervisor with one process, and JAX finds the others by
itself.  With `--processes N` the N processes run here, and are told of each other by
`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.

Exit codes:
  0: every process ended with 0.
  2: wrong input (of this command, or a process said so); never restarted, unless a
    signal had killed another one.
  65: a run stopped itself, as its steps went wrong; never restarted either.
  143: this parent got SIGTERM, passed it on, and all saved their last step or
    had finished: the same command goes on from there.
  130: this parent got SIGTERM or SIGINT, passed it on, and not all have saved.
  otherwise: the code of the first process that failed, once no restarts are left;
    128 + n for one that signal n killed, 143 also for one that SIGTERM made save and
    end (`jaxpref.runtime.preemption`): where this parent got none, it is restarted.
    One that hung was killed: 137.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from jaxpref.runtime import heartbeat

WRONG_INPUT = 2
FINAL = {WRONG_INPUT: "wrong input", 65: "a run that stopped itself"}
"""Codes after which the same command would come to the same end."""
INTERRUPTED = 130
SAVED = 128 + signal.SIGTERM
_POLL = 0.1  # seconds between looks at the processes
_LONGEST_PAUSE = 60.0
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


class _Signalled(Exception):
    """SIGTERM or SIGINT came; `args[0]` is its number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuperviseConfig:
    """What is started, and how often."""

    command: tuple[str, ...]
    """The command and its arguments."""
    processes: int = 1
    """Copies of it on this machine."""
    restarts: int = 3
    """Times that all are started again after one failed."""
    grace: float = 30.0
    """Seconds that a process has to end after SIGTERM or SIGINT, before SIGKILL."""
    pause: float = 1.0
    """Seconds before the first restart; doubled before each later one, at most 60."""
    hung: float = 1800.0
    """Seconds without word of progress after which a process counts as hung; 0: never.
    Longer than what takes longest without any: compiling, or a full bucket's write."""
    steady: float = 600.0
    """Seconds from start to failure that make it the first failure again, if a
    checkpoint was completed in them: a run that gets on never uses up its restarts."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command of the command line; the exit code."""
    return supervise(_parse(sys.argv[1:] if argv is None else list(argv)))


def supervise(config: SuperviseConfig) -> int:
    """Runs the processes until all end well, or no restarts are left.

    Must be called from the main thread, as it handles SIGTERM and SIGINT.

    Returns:
      The exit code; the module's docstring lists them.
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
                # Not SIGTERM, at which they would try to agree with the dead on a step;
                # and nothing that Python sees where they wait for ever.
                number = signal.SIGKILL if hung else signal.SIGINT
                _stop(processes, number, config.grace)
                saved = any(Path(folder).glob(f"*{heartbeat.SAVED}"))
            code = processes[index].returncode
            ended = f"process {index} of {config.processes} "
            ended += hung or f"ended {_how(code)}"
            for process in processes:
                # Who lost a peer may call that by a wrong name.
                if (what := FINAL.get(process.returncode)) and not killed:
                    code = process.returncode
                    _say(f"{ended}; {what} (code {code}) is not restarted")
                    return code
            if saved and time.monotonic() - began >= config.steady:
                used = 0
            if used >= config.restarts:
                _say(f"{ended}; no restarts left of {config.restarts}")
                return code if code > 0 else 128 - code
            pause = min(config.pause * 2**used, _LONGEST_PAUSE)
            used += 1
            _say(f"{ended}; restart {used} of {config.restarts} in {pause:g} s")
            processes.clear()
            time.sleep(pause)
    except _Signalled as signalled:
        _stop(processes, signalled.args[0], config.grace)
        codes = {process.returncode for process in processes}
        if not codes or not codes <= {0, SAVED}:
            return INTERRUPTED
        return SAVED if SAVED in codes else 0
    except OSError as error:
        _stop(processes, signal.SIGKILL, config.grace)
        _say(f"error: {config.command[0]}: {error.strerror}")
        return WRONG_INPUT


def _start(
    config: SuperviseConfig, processes: list[subprocess.Popen], folder: Path
) -> None:
    """Appends each process as it is started, so that none is lost to a signal."""
    told = {}
    if config.processes > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        told["JAX_COORDINATOR_ADDRESS"] = f"localhost:{port}"
        told["JAX_NUM_PROCESSES"] = str(config.processes)
    for index in range(config.processes):
        mine = told | ({"JAX_PROCESS_ID": str(index)} if told else {})
        mine |= {heartbeat.VARIABLE: str(folder / str(index))}
        with _signals_held():
            processes.append(
                subprocess.Popen(
                    config.command,
                    env=os.environ | mine,
                    # Ctrl-C reaches the parent alone, which passes it on once.
                    start_new_session=True,
                    preexec_fn=_in_the_child,
                )
            )


@contextlib.contextmanager
def _signals_held():
    """Between fork and append a signal would leave a process that nobody knows."""
    held = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)


def _in_the_child() -> None:
    """A child dies with its parent: two runs must never write to one folder."""
    if _LIBC is not None:
        _LIBC.prctl(_DEATH_SIGNAL, signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})


def _first_failure(
    config: SuperviseConfig, processes: Sequence[subprocess.Popen], folder: Path
) -> tuple[int, str] | None:
    """The first that ends with another code than 0, or hangs; None if all end well.

    Returns:
      Its index, and what is to be said of it if it hangs, else nothing.
    """
    listener = heartbeat.Monitor(folder, config.hung)
    while True:
        codes = [process.poll() for process in processes]
        for index, code in enumerate(codes):
            if code:
                return index, ""
        if None not in codes:
            return None
        running = [index for index, code in enumerate(codes) if code is None]
        if silent := listener.silent(running):
            return silent
        time.sleep(_POLL)


def _stop(processes: Sequence[subprocess.Popen], number: int, grace: float) -> None:
    """Sends a signal to all that still run, and SIGKILL to what outlives the grace."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)
    end = time.monotonic() + grace
    while any(p.poll() is None for p in processes) and time.monotonic() < end:
        time.sleep(_POLL)
    for process in processes:
        # The group too: a process may leave children behind.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _raise(number: int, frame) -> None:
    # Once is enough: what follows is bounded by the grace time.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    raise _Signalled(number)


def _how(code: int) -> str:
    if code >= 0:
        return f"with code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"


def _say(line: str) -> None:
    print(f"supervise: {line}", file=sys.stderr, flush=True)


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
        ("restarts", int, 0, "times that all are started again after one failed"),
        ("grace", float, 0, "seconds from SIGTERM or SIGINT to SIGKILL"),
        ("pause", float, 0, "seconds before the first restart; later ones double"),
        ("hung", float, 0, "seconds without progress of a run that hangs; 0: never"),
        ("steady", float, 0, "seconds, with a checkpoint, that renew the restarts"),
    ):
        parser.add_argument(
            f"--{name}",
            type=_at_least(least, kind),
            default=getattr(default, name),
            help=f"{what} (default: %(default)s)",
        )
    parsed = parser.parse_args(options)
    if not command:
        parser.error("no COMMAND: put it after --")
    return SuperviseConfig(command=tuple(command), **vars(parsed))


def _at_least(least: float, kind: type):
    def read(text: str):
        if not (value := kind(text)) >= least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return value

    read.__name__ = kind.__name__  # argparse names it where the text is no number
    return read


if __name__ == "__main__":
    sys.exit(main())
