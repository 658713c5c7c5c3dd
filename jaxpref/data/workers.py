"""Batches made in processes of their own, in turns, in the order of one."""

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
    """An iterator over batches of which process i of n makes each n-th, from the i-th.

    Its state is that of one iterator in this process: a run may go on with another
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
        """Starts nothing yet: the processes begin with the first batch asked for.

        Args:
          part: `part(state, i)`, the batches of process i from `state` on; pickled.
          state: where to begin.
          after: `after(state, own)`, the state after the next batch, `own` being that
            of the part it came from.
          processes: n.
          prefetch: batches that each keeps ready.
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
        """That of one iterator in this process."""
        return self._state

    def set_state(self, state: Any) -> None:
        """Goes on where `get_state` was asked, of any number of processes."""
        self.close()
        self._state = state

    def close(self) -> None:
        """Ends the processes; the next batch asked for starts them again."""
        for worker in self._workers:
            worker.close()
        self._workers = []
        atexit.unregister(self.close)

    def _start(self) -> None:
        if not flags.FLAGS.is_parsed():  # which Grain asks for; we have none
            flags.FLAGS.mark_as_parsed()
        # Python ends its processes with SIGTERM, which these do not see, and waits.
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
    """Elements, each with the state of their iterator after it."""

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
    # A machine that shuts down sends one to all, and the parent needs its batches until
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
