"""Layouts: how pairs become the rows of a batch.

To add a layout, write a frozen dataclass with the methods of `Layout`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from jaxpref.data.batch import PreferenceBatch
from jaxpref.data.dataset import PreferenceDataset
from jaxpref.data.layouts.packed import PackedLayout as PackedLayout
from jaxpref.data.layouts.packed_sizes import packed_layout as packed_layout
from jaxpref.data.layouts.padded import PaddedLayout as PaddedLayout
from jaxpref.data.layouts.padded import padded_layout as padded_layout
from jaxpref.data.samplers import Order


class Layout(Protocol):
    """The sizes of a run's batches, and this process's share of their rows."""

    @property
    def batch_size(self) -> int:
        """Pairs per step, over all micro-batches and processes."""
        ...

    @property
    def accumulation(self) -> int:
        """A, micro-batches per step."""
        ...

    @property
    def rows(self) -> int:
        """Rows of a micro-batch, over all processes."""
        ...

    def of_all_processes(self) -> "Layout":
        """The same layout with the rows of all processes."""
        ...

    def batches(
        self,
        dataset: PreferenceDataset,
        order: Order,
        *,
        reference: Mapping[str, np.ndarray] | None = None,
        threads: int = 2,
        prefetch: int = 4,
        processes: int = 0,
    ) -> Iterator[PreferenceBatch]:
        """Endless training batches of the pairs chosen by `order`.

        Args:
          dataset: the training data.
          order: from `samplers`.
          reference: float32 [N, K] arrays by name, copied into the batches, or None.
          threads: threads that make batches in advance; 0 makes each batch on demand.
          prefetch: number of batches made in advance.
          processes: processes that make batches instead of threads.

        Returns:
          An iterator with `get_state()`, `set_state(state)` and `close()`, whose state
          is {"next_index": step}.
        """
        ...

    def eval_batches(
        self,
        dataset: PreferenceDataset,
        *,
        indices: np.ndarray | None = None,
        reference: Mapping[str, np.ndarray] | None = None,
        threads: int = 2,
        prefetch: int = 4,
    ) -> Iterable[PreferenceBatch]:
        """Every pair once, or the pairs of `indices` in approximately that order.

        Batches have the shape of the training batches, and every process gets the same
        number of them; unused slots have pair -1 and weight 0.
        """
        ...

    def abstract_batch(
        self, *, numbers: Iterable[str] = (), reference: Iterable[str] = ()
    ) -> Any:
        """A batch of all processes, made of zeros that take no memory.

        Args:
          numbers: names of the numbers of records that the loss reads.
          reference: names of the reference scores.
        """
        ...

    def describe(self) -> str:
        """The shape of every batch in one line."""
        ...

    def rounding(self) -> str:
        """The parts of the shape that affect the rounding of scores, as text."""
        ...

    def overhead(self, dataset: PreferenceDataset) -> float:
        """Number of tokens computed per token of the dataset."""
        ...
