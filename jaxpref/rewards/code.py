"""Whether the code in an answer passes its tests.

The code runs in a process of its own with limits on time, memory, files, and processes.
The limits stop accidents, not attacks: the code can read files and use the network, as
the user who runs it can.
"""

import concurrent.futures
import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxpref.errors import InputError
from jaxpref.rewards.answered import Answered

SECONDS = 10
"""CPU time for the code of an answer and all its tests together."""
WAITING = 5
"""How many times as long it may take if it waits."""
MEMORY = 2**30
"""Bytes of memory that they may use."""
FILE = 2**20
"""Largest file that they may write, in bytes."""
FENCED = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)```", re.DOTALL)
"""A code block in Markdown, with the name of its language."""
PYTHON = ("", "python", "python3", "py")

_CHILD = Path(__file__).with_name("code_child.py")


def code_of(answer: str) -> str:
    """The Python code in an answer.

    The last Markdown code block whose language is Python or not named; the whole answer
    if there is none.
    """
    blocks = [
        code for name, code in FENCED.findall(answer) if name.casefold() in PYTHON
    ]
    return blocks[-1] if blocks else answer


def share_passed(code: str, tests: Sequence[str], *, seconds: int = SECONDS) -> float:
    """The share of the tests that pass after the code has run.

    Args:
      code: Python code.
      tests: Python statements such as "assert double(2) == 4".  Each is executed with
        the names that the code and the tests before it have defined, and passes if it
        raises nothing.
      seconds: CPU time for code and tests together, which does not depend on what else
        the machine does.

    Returns:
      From 0 to 1; 0 if the code itself raises, and tests that were not reached in time
      have not passed.
    """
    if not tests:
        raise ValueError("Expected at least one test.")
    read, write = os.pipe()
    # Processes that the code has started may hold the other end open.
    os.set_blocking(read, False)
    with os.fdopen(read, "rb") as passed, tempfile.TemporaryDirectory() as folder:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_CHILD), str(write)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(write,),
                cwd=folder,
                env={},
                start_new_session=True,
            )
        finally:
            os.close(write)
        _limit(process.pid, seconds)
        request = json.dumps([code, list(tests)]) + "\n"
        try:
            process.communicate(request.encode(), timeout=WAITING * seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _kill(process)
        count = len(passed.read(len(tests) + 1) or b"")
    # More bytes than tests: the code has written some itself.
    return count / len(tests) if count <= len(tests) else 0.0


def _limit(pid: int, seconds: int) -> None:
    """Sets the limits of the child before it gets any code to run."""
    for what, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, FILE),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.prlimit(pid, what, (limit, limit))


def _kill(process: subprocess.Popen) -> None:
    """Ends the child and the processes that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


@dataclasses.dataclass(frozen=True)
class CodeTests:
    """The share of the tests in a field of the record that the answer's code passes."""

    field: str
    """Field with the tests: a list of Python statements, or a text with one test."""

    def __call__(self, answered: Sequence[Answered]) -> list[Float[np.ndarray, " K"]]:
        """See `Reward`.

        Raises:
          InputError: if a record has no tests.
        """
        tests = [self._tests(one) for one in answered]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            shares = [
                [pool.submit(share_passed, code_of(text), own) for text in one.texts]
                for one, own in zip(answered, tests)
            ]
            return [np.array([x.result() for x in own], float) for own in shares]

    def _tests(self, answered: Answered) -> list[str]:
        value = answered.field(self.field)
        tests = [value] if isinstance(value, str) else value
        if (
            isinstance(tests, list)
            and tests
            and all(isinstance(test, str) and test.strip() for test in tests)
        ):
            return tests
        raise InputError(
            f"{answered.place}: field '{self.field}' must hold tests, such as "
            f'["assert double(2) == 4"], but it is {value!r:.50}; name another field '
            "with --tests-field"
        )
