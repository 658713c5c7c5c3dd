"""A parent that restarts a run as a whole: `python -m jaxpref.supervise -- COMMAND`.

When one process of a run dies, the others wait for it in a collective or are aborted by
JAX's own service (exit code 134), and none of them can begin again alone.  So all are
stopped and started again, and go on from their last checkpoint.  Nothing here imports
jax: the parent stays small, and outlives what kills its children.

On a pod every worker runs one supervisor with one process, and JAX finds the others by
itself.  With `--processes N` the N processes run here, and are told of each other by
`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.

Exit codes:
  0: every process ended with 0.
  2: wrong input (of this command, or a process said so); never restarted.
  130: this parent got SIGTERM or SIGINT, passed it on, and not all had finished.
  otherwise: the code of the first process that failed, once no restarts are left;
    128 + n for one that signal n killed, 143 also for one that SIGTERM made save and
    end (`jaxpref.train.preemption`): where this parent got none, it is restarted.
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
import time
from collections.abc import Sequence

WRONG_INPUT = 2
INTERRUPTED = 130
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
    try:
        for restart in range(config.restarts + 1):
            _start(config, processes)
            failed = _first_failure(processes)
            if failed is None:
                return 0
            # Not SIGTERM, at which they would try to agree with the dead on a step.
            _stop(processes, signal.SIGINT, config.grace)
            code = processes[failed].returncode
            ended = f"process {failed} of {config.processes} ended {_how(code)}"
            if WRONG_INPUT in (process.returncode for process in processes):
                _say(f"{ended}; wrong input (code {WRONG_INPUT}) is not restarted")
                return WRONG_INPUT
            if restart < config.restarts:
                pause = min(config.pause * 2**restart, _LONGEST_PAUSE)
                number = f"{restart + 1} of {config.restarts}"
                _say(f"{ended}; restart {number} in {pause:g} s")
                processes.clear()
                time.sleep(pause)
        _say(f"{ended}; no restarts left of {config.restarts}")
        return code if code > 0 else 128 - code
    except _Signalled as signalled:
        _stop(processes, signalled.args[0], config.grace)
        finished = processes and not any(process.returncode for process in processes)
        return 0 if finished else INTERRUPTED
    except OSError as error:
        _stop(processes, signal.SIGKILL, config.grace)
        _say(f"error: {config.command[0]}: {error.strerror}")
        return WRONG_INPUT


def _start(config: SuperviseConfig, processes: list[subprocess.Popen]) -> None:
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


def _first_failure(processes: Sequence[subprocess.Popen]) -> int | None:
    """Index of the first that ends with another code than 0; None if none does."""
    while True:
        codes = [process.poll() for process in processes]
        for index, code in enumerate(codes):
            if code:
                return index
        if None not in codes:
            return None
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
        prog="python -m jaxpref.supervise",
        usage="%(prog)s [options] -- COMMAND...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, kind, least, what in (
        ("processes", int, 1, "copies of COMMAND on this machine"),
        ("restarts", int, 0, "times that all are started again after one failed"),
        ("grace", float, 0, "seconds from SIGTERM or SIGINT to SIGKILL"),
        ("pause", float, 0, "seconds before the first restart; later ones double"),
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
