"""Batches made in separate processes, in turns and in a fixed order."""

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
from absl import flags

from jaxpref.data.batch import PreferenceBatch


class InProcesses:
    """An iterator over batches, in which process i of n makes batches i, i + n, ...

    Its state is that of a single iterator in this process, so a run may resume with any
    number of processes, or with none.
    """

    def __init__(
        self,
        part: Callable[[Any, int], grain.IterDataset],
        state: Any,
        after: Callable[[Any, Any], Any],
        *,
        processes: int,
        prefetch: int,
    ):
        """Does not start the processes, which start with the first batch.

        Args:
          part: `part(state, i)`, the batches of process i from `state` on; pickled.
          state: the initial state.
          after: `after(state, own)`, the state after the next batch, where `own` is the
            state of the part that made it.
          processes: n.
          prefetch: batches that each process prepares in advance.
        """
        self._part, self._after = part, after
        self._processes, self._prefetch = processes, max(prefetch, 1)
        self._workers: list[grain.DatasetIterator] = []
        self.set_state(state)

    def __iter__(self) -> Iterator[PreferenceBatch]:
        return self

    def __next__(self) -> PreferenceBatch:
        """The next batch."""
        if not self._workers:
            self._start()
        worker = self._workers.pop(0)
        self._workers.append(worker)
        batch, own = next(worker)
        self._state = self._after(self._state, own)
        return batch

    def get_state(self) -> Any:
        """The state of a single iterator in this process."""
        return self._state

    def set_state(self, state: Any) -> None:
        """Continues from a state of `get_state`, for any number of processes."""
        self.close()
        self._state = state

    def close(self) -> None:
        """Ends the processes; the next batch starts them again."""
        for worker in self._workers:
            worker.close()
        self._workers = []
        atexit.unregister(self.close)

    def _start(self) -> None:
        if not flags.FLAGS.is_parsed():  # Grain requires parsed flags; there are none
            flags.FLAGS.mark_as_parsed()
        # Python ends child processes with SIGTERM and waits, but these ignore it.
        atexit.register(self.close)
        for index in range(self._processes):
            dataset = _WithState(self._part(self._state, index)).mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=1, per_worker_buffer_size=self._prefetch
                ),
                worker_init_fn=_end_with_parent,
            )
            worker = iter(dataset)
            worker.start_prefetch()
            self._workers.append(worker)


class _WithState(grain.IterDataset):
    """Elements with the state of their iterator after each."""

    def __iter__(self) -> grain.DatasetIterator:
        return _WithStateIterator(iter(self._parent))


class _WithStateIterator(grain.DatasetIterator):
    def __next__(self) -> tuple[Any, Any]:
        element = next(self._parent)
        return element, self._parent.get_state()

    def get_state(self) -> Any:
        return self._parent.get_state()

    def set_state(self, state: Any) -> None:
        self._parent.set_state(state)


def _end_with_parent(index: int, count: int) -> None:
    # A shutdown sends SIGTERM to all processes, and the parent needs its batches until
    # it has saved.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    parent = multiprocessing.parent_process()
    if parent is None:
        return  # this is the parent itself

    # A killed run cannot tell its processes to end.
    def watch():
        parent.join()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
