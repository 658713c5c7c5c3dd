"""Tokenized chunks on disk, and shared among the processes of a run.

A chunk's name is the digest of all that decides its content: its rows, the tokenizer,
the options, and the code.  Another record, option, or version has another name, so
nothing stale is ever found.  Files are written atomically and never changed; a damaged
one is detected and replaced.  Those that were not used for the longest time are removed
when all together exceed `JAXPREF_CACHE_LIMIT`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import mmap
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jaxpref.data.array_file import Buffer, Damaged
from jaxpref.data.chunk import (
    Chunk,
    code_digest,
    open_chunk,
    tokenizer_digest,
)
from jaxpref.data.chunk_pool import num_processes, read_chunks
from jaxpref.data.chunk_rules import Rules
from jaxpref.data.sources import Divisible
from jaxpref.errors import InputError, show, visible_line
from jaxpref.files import write_whole
from jaxpref.runtime import heartbeat
from jaxpref.runtime.cache_folder import (
    LIMIT,
    cache_folder,
    cache_limit,
    make_private,
    remove_least_recent,
    warn_if_others_write,
)
from jaxpref.runtime.processes import (
    assert_equal_across_processes,
    exchange,
    first_failure,
    gather,
    processes_on_this_host,
    share_of_processes,
)

HOLDS = "the tokenized records"
_SUFFIX = ".tokens"
_log = logging.getLogger("jaxpref")


def tokens_folder() -> Path:
    """Where the runs of this user keep tokenized records; see `cache_folder`.

    Raises:
      InputError: also if `JAXPREF_CACHE_LIMIT` is not a size.
    """
    cache_limit()
    return cache_folder() / "tokens"


class _Held(NamedTuple):
    """A chunk and the bytes that it reads from."""

    buffer: Buffer
    chunk: Chunk


@dataclasses.dataclass(frozen=True)
class ChunkReader:
    """The chunks of a source, tokenized or from the cache."""

    source: Divisible
    tokenizer: Any
    rules: Rules
    rows: int
    """Rows of a chunk."""
    folder: Path | None
    """Where chunks are kept.  If None, every process tokenizes all."""

    def __len__(self) -> int:
        return -(-self.source.num_rows // self.rows)

    def read(self, numbers: range) -> Iterator[Chunk]:
        """Chunks in order.

        With a folder, all processes of a run must call this together: each tokenizes a
        part of the chunks that none of them has, and gets the others from disk or, if
        they share none, from the other processes.

        Raises:
          InputError: at the first chunk with a malformed row, on all processes.
        """
        names = self._names(numbers)
        if names and share_of_processes()[1] > 1:
            yield from self._shared(numbers, names)
            return
        held = {} if names is None else self._stored(enumerate(names))
        lacking = [n for n in range(len(numbers)) if n not in held]
        made = self._made([numbers[n] for n in lacking], num_processes(len(lacking)))
        with contextlib.ExitStack() as stack:
            if names is not None and lacking:
                stack.callback(self._keep_within_limit)
            stack.enter_context(contextlib.closing(made))
            for position in range(len(numbers)):
                if position in held:
                    yield held.pop(position).chunk
                else:
                    name = None if names is None else names[position]
                    yield self._kept(name, next(made)).chunk

    def _shared(self, numbers: range, names: list[str]) -> Iterator[Chunk]:
        """The chunks of a run with several processes."""
        assert_equal_across_processes("the data", {"records": names})
        held, everyone = self._stored(enumerate(names)), range(len(names))
        has = gather(np.array([n in held for n in everyone], np.int32))
        nobody = ~has.any(0)
        index, count = share_of_processes()
        mine = np.flatnonzero(nobody)[index::count]
        made = self._made(
            [numbers[n] for n in mine],
            num_processes(len(mine), sharing=processes_on_this_host()),
        )
        failed, reason = len(names), ""
        for position in mine.tolist():
            try:
                held[position] = self._kept(names[position], next(made))
            except InputError as error:
                failed, reason = position, str(error)
                break
        failed, reason = first_failure(failed, reason)
        there = [(n, names[n]) for n in everyone[:failed] if n not in held]
        held |= self._stored(there)  # by another process on the same disk
        own = {n: one.buffer for n, one in held.items() if n < failed}
        for position, buffer in exchange(own, failed).items():
            held[position] = self._kept(names[position], buffer)
        if not has[index].all():
            self._keep_within_limit()
        for position in range(failed):
            yield held.pop(position).chunk
        if reason:
            raise InputError(reason)

    def _names(self, numbers: range) -> list[str] | None:
        """The names of chunks; None if they are not kept."""
        tokenizer = None if self.folder is None else tokenizer_digest(self.tokenizer)
        if tokenizer is None:
            return None
        about = {"tokenizer": tokenizer, "code": code_digest()}
        settings = json.dumps(about | self.rules.describe(), sort_keys=True)
        names = []
        for number in numbers:
            heartbeat.beat(f"finding {self.source.row_location(number * self.rows)}")
            content = self.source.content(*self._rows(number))
            if content is None:
                return None
            digest = hashlib.sha256(settings.encode() + content)
            names.append(digest.hexdigest()[:40])
        return names

    def _rows(self, number: int) -> tuple[int, int]:
        start = number * self.rows
        return start, min(start + self.rows, self.source.num_rows)

    def _made(
        self, numbers: Sequence[int], processes: int
    ) -> Generator[bytes, None, None]:
        """The bytes of chunks, tokenized one after the other or by processes."""
        parts: Iterable[Callable[[], Divisible]] = (
            functools.partial(self.source.part, *self._rows(n)) for n in numbers
        )
        made = read_chunks(parts, self.tokenizer, self.rules, processes=processes)
        total = sum(stop - start for start, stop in map(self._rows, numbers))
        with (
            contextlib.closing(made),
            tqdm(
                total=total, desc="tokenize", unit="row", leave=False, disable=None
            ) as bar,
        ):
            for number, buffer in zip(numbers, made, strict=True):
                start, stop = self._rows(number)
                heartbeat.beat(f"reading {self.source.row_location(stop - 1)}")
                bar.update(stop - start)
                yield buffer

    def _stored(self, names: Iterable[tuple[int, str]]) -> dict[int, _Held]:
        """Those of the chunks that are on disk, mapped into memory."""
        if self.folder is None or not self.folder.is_dir():
            return {}
        warn_if_others_write(self.folder, holds=HOLDS)
        found = {}
        for position, name in names:
            one = _opened(self.folder / f"{name}{_SUFFIX}")
            if one is not None:
                found[position] = one
        return found

    def _kept(self, name: str | None, buffer: bytes) -> _Held:
        """A new chunk, on disk if possible."""
        if self.folder is None or name is None:
            return _Held(buffer, open_chunk(buffer))
        path = self.folder / f"{name}{_SUFFIX}"
        try:
            make_private(self.folder)
            write_whole(path, buffer)
            with contextlib.suppress(OSError):
                path.chmod(path.stat().st_mode & ~0o022)
        except InputError as error:
            _warn_once(f"{error}; records are tokenized again at the next start")
            return _Held(buffer, open_chunk(buffer))
        return _opened(path) or _Held(buffer, open_chunk(buffer))

    def _keep_within_limit(self) -> None:
        """Removes the chunks that no run has used for the longest time."""
        limit = cache_limit()
        if self.folder is None or limit is None:
            return
        count, size = remove_least_recent(self.folder, _SUFFIX, limit=limit)
        if count:
            line = (
                f"{self.folder}: removed {size / 2**20:,.1f} MiB that were not used for"
                f" the longest time, to stay within {limit / 2**20:,.1f} MiB ({LIMIT})"
            )
            show(visible_line(line))  # on whichever process removed them


def _opened(path: Path) -> _Held | None:
    """A chunk on disk; None if there is none, or it is damaged."""
    try:
        with open(path, "rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with contextlib.suppress(OSError):  # the folder may be read-only
            os.utime(path)  # when it was used; see `remove_least_recent`
        return _Held(buffer, open_chunk(buffer))
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("%s: cannot be read (%s)", path, error.strerror or error)
        return None
    except (Damaged, ValueError):  # an empty file cannot be mapped
        _log.warning("%s: damaged; its records will be tokenized again", path)
        with contextlib.suppress(OSError):  # the folder may be read-only
            path.unlink()
        return None


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning("%s", message)
