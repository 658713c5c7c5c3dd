"""Chunks tokenized in several processes.

Most of the time goes into Python code, which threads would not speed up.  The processes
are plain children that read requests from their standard input: `multiprocessing` would
run the caller's script again, unless it has a guard.
"""

import concurrent.futures
import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable
from typing import IO, Any

from jaxpref.data.chunk import read_chunk
from jaxpref.data.chunk_rules import Rules
from jaxpref.data.sources import Divisible
from jaxpref.errors import InputError

CHUNKS_PER_PROCESS = 4
"""Chunks that make up for the start of a process, which takes about two seconds."""
MOST_PROCESSES = 32
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from jaxpref.data.chunk_pool import serve; serve()"
)


def num_processes(chunks: int, *, sharing: int = 1) -> int:
    """How many processes should tokenize; 0 for the calling one.

    Args:
      chunks: how many chunks there are.
      sharing: processes on this host that do the same.
    """
    cores = len(os.sched_getaffinity(0)) if _HAS_AFFINITY else os.cpu_count() or 1
    count = min(cores // sharing, chunks // CHUNKS_PER_PROCESS, MOST_PROCESSES)
    return count if count > 1 else 0


def read_chunks(
    parts: Iterable[Callable[[], Divisible]],
    tokenizer: Any,
    rules: Rules,
    *,
    processes: int,
) -> Generator[bytes, None, None]:
    """The bytes of `read_chunk` for each part, in order.

    Args:
      parts: functions that return the rows of a chunk, called when it is due.
      tokenizer: from `load_tokenizer`.
      rules: how rows become tokens.
      processes: how many to start; 0 reads here.

    Raises:
      InputError: if a row of the next chunk is malformed, or a process fails.
    """
    if not processes:
        for part in parts:
            yield read_chunk(part(), tokenizer, rules)
        return
    with contextlib.ExitStack() as stack:
        idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        for _ in range(processes):
            idle.put(stack.enter_context(_Child(tokenizer, rules)))
        pool = concurrent.futures.ThreadPoolExecutor(processes)
        stack.callback(pool.shutdown, cancel_futures=True)

        def read(part: Divisible) -> bytes:
            child = idle.get()
            try:
                return child.read(part)
            finally:
                idle.put(child)

        waiting = []
        for part in parts:
            waiting.append(pool.submit(read, part()))
            if len(waiting) > 2 * processes:  # bounds what is read ahead
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


class _Child:
    """A process that tokenizes chunks; killed at the end of the context."""

    def __init__(self, tokenizer: Any, rules: Rules):
        self._process = subprocess.Popen(
            # -P: nothing is imported from the working directory, unless it is here.
            [sys.executable, "-P", "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",  # the accelerator belongs to this process
                "TOKENIZERS_PARALLELISM": "false",
                "TRANSFORMERS_VERBOSITY": "error",
                "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
            },
        )
        self._first: Any = tokenizer, rules

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def read(self, part: Divisible) -> bytes:
        """The bytes of a chunk; raises its InputError."""
        requests, replies = self._process.stdin, self._process.stdout
        assert requests is not None and replies is not None
        try:
            if self._first is not None:
                _send(requests, self._first)
                self._first = None
            _send(requests, part)
            reply = _receive(replies)
        except (OSError, EOFError):
            raise InputError(self._ended()) from None
        if isinstance(reply, bytes):
            return reply
        raise reply

    def _ended(self) -> str:
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"code {code}"
        return (
            f"a process that tokenizes records ended by {how}; if its memory was full,"
            " run the command with fewer cores (taskset -c 0-3 COMMAND)"
        )


def serve() -> None:
    """Tokenizes what comes on standard input, until it ends."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may write to the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    requests = sys.stdin.buffer
    with contextlib.suppress(EOFError, BrokenPipeError):
        tokenizer, rules = _receive(requests)
        while True:
            part = _receive(requests)
            try:
                reply: bytes | Exception = read_chunk(part, tokenizer, rules)
            except Exception as error:
                reply = error
            _send(replies, reply)


def _send(file: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    file.write(len(data).to_bytes(8, "little") + data)
    file.flush()


def _receive(file: IO[bytes]) -> Any:
    """What `_send` sent; both ends are processes of ours."""
    size = file.read(8)
    data = file.read(int.from_bytes(size, "little"))
    if len(size) < 8 or len(data) < int.from_bytes(size, "little"):
        raise EOFError
    return pickle.loads(data)


_HAS_AFFINITY = hasattr(os, "sched_getaffinity")
