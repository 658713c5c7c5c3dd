"""Checkpoints: state and data position in one Orbax step, with digests of our own."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxpref.errors import InputError, first_line
from jaxpref.runtime import heartbeat
from jaxpref.runtime.processes import (
    broadcast_from_process_zero,
    failing_processes,
)
from jaxpref.train.state import TrainState

PAUSES = 0.0, 1.0, 4.0
"""Seconds before each try to read a checkpoint."""

_log = logging.getLogger("jaxpref")


class CheckpointError(InputError):
    """A checkpoint could not be written or read."""


class Checkpoints:
    """The `checkpoints/` folder of a run."""

    def __init__(self, folder: Path, *, keep: int):
        """Opens (and makes) the folder; the newest `keep` steps are kept."""
        self.folder, self._keep = folder, keep
        self.best: int | None = None
        """A step that is kept however old it is."""
        self._writing: int | None = None
        options = ocp.CheckpointManagerOptions(preservation_policy=self, create=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        """Which of the steps, oldest first, Orbax is to keep."""
        newest = len(checkpoints) - self._keep
        return [n >= newest or c.step == self.best for n, c in enumerate(checkpoints)]

    def latest_step(self) -> int | None:
        """The newest complete step on disk, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data: dict) -> None:
        """Starts writing one step; what is written is a copy, training goes on.

        Raises:
          CheckpointError: if there is no room for it, or if this or the previous step
            could not be written.
        """
        if step in self._manager.all_steps():
            return
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            self._raise(OSError(f"{needed:,} bytes needed, {free:,} are free"))
        meta = {"data": data, "digests": digests(state)}
        meta["digest"] = digest_of_meta(meta)
        try:
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
                ),
            )
        except Exception as error:
            self._raise(error)
        if not saved:
            self._raise(OSError(f"step {step} was refused"))
        self._is_complete()  # the one before, which Orbax has waited for
        self._writing = step

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          CheckpointError: if it could not be written.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            self._raise(error)
        self._is_complete()

    def restore(
        self, abstract: TrainState, *, only: int | None = None
    ) -> tuple[TrainState, dict] | None:
        """The newest step that is whole, with its data position; None if there is none.

        Every array is compared with the digest taken before it was written.  A step
        that does not match, or cannot be read, in any of the processes, is reported and
        the one before is tried by all.  Once one is whole, those that do not match are
        deleted, to be written again; what could not be read at several tries may be
        whole, and is moved to `unreadable/` beside the folder.

        Args:
          abstract: shapes, dtypes and shardings to restore to.
          only: this step and no other one.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        steps = _steps_of_process_zero(steps if only is None else [only])
        unreadable = []
        for number, step in enumerate(steps):
            found, complaint = self._read(step, abstract)
            unable = failing_processes(found is not None)
            if found is None or unable:
                where = f"process {unable[0]} says so"
                _tell(unable, "%d cannot be read (%s)", step, complaint or where)
                unreadable.append(step)
                continue
            state, meta = found
            now = digests(state)
            expected = meta.get("digests", {})
            wrong = [name for name in now if now[name] != expected.get(name)]
            if meta.get("digest", digest_of_meta(meta)) != digest_of_meta(meta):
                wrong.append("meta/metadata")
            if unable := failing_processes(not wrong):
                what = wrong[0] if wrong else f"what process {unable[0]} has read"
                differs = "%d is damaged: %s differs from what was saved"
                _tell(unable, differs, step, what)
                continue
            if only is None:
                self._clear(steps[:number], unreadable)
            return state, meta["data"]
        if only is not None:
            raise CheckpointError(f"{self.folder}: step {only} cannot be restored")
        if steps:
            raise CheckpointError(
                f"{self.folder}: none of the checkpoints {steps} can be restored; "
                "move the folder away to start again"
            )
        return None

    def _read(
        self, step: int, abstract: TrainState
    ) -> tuple[tuple[TrainState, dict] | None, str]:
        """This process's part of a step and what lies beside it, or why it has none.

        Not by the manager: where one process cannot read, it lets the others wait.
        """
        folder, why = self._manager.directory / str(step), ""
        for pause in PAUSES:  # a file system on a network may be away for a moment
            time.sleep(pause)
            heartbeat.beat(f"reading checkpoint {step}")
            try:
                meta = json.loads((folder / "meta" / "metadata").read_text())
                if not meta.keys() >= {"data", "digests"}:
                    raise ValueError("meta/metadata is not what was written there")
                state = ocp.StandardCheckpointHandler().restore(
                    folder / "state", args=ocp.args.StandardRestore(abstract)
                )
            except Exception as error:
                why = first_line(error)
            else:
                return (state, meta), ""
        return None, why

    def _clear(self, steps: list[int], unreadable: list[int]) -> None:
        """Takes steps away, to be written again; the unreadable ones are kept aside."""
        if not steps:
            return
        if jax.process_index() == 0:
            aside = self.folder.parent / "unreadable"
            for step in steps:
                if step in unreadable:
                    shutil.rmtree(aside / str(step), ignore_errors=True)
                    aside.mkdir(exist_ok=True)
                    shutil.move(self.folder / str(step), aside / str(step))
                else:
                    shutil.rmtree(self.folder / str(step), ignore_errors=True)
        multihost_utils.sync_global_devices("damaged checkpoints were taken away")
        self._manager.reload()

    def close(self) -> None:
        """Waits for writes in flight and lets go of the folder."""
        try:
            self._manager.close()
        except Exception as error:
            self._raise(error)

    def _is_complete(self) -> None:
        if self._writing is not None:
            heartbeat.mark_saved(self._writing)
        self._writing = None

    def _raise(self, error: Exception) -> NoReturn:
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise error  # of another process that died: room would not help
        raise CheckpointError(
            f"{self.folder}: a checkpoint could not be written ({first_line(error)}); "
            f"make room, and the same command resumes from step {self.latest_step()}"
        ) from error


def _steps_of_process_zero(steps: list[int], *, most: int = 64) -> list[int]:
    """The steps that process 0 sees: file systems may show others elsewhere."""
    mine = np.full(most, -1, np.int32)
    mine[: len(steps[:most])] = steps[:most]
    return [int(step) for step in broadcast_from_process_zero(mine) if step >= 0]


def _tell(unable: list[int], message: str, *args) -> None:
    """A warning, of the first process and the first that is unable, not of all."""
    if jax.process_index() in (0, unable[0]):
        _log.warning(f"checkpoint {message}", *args)


def digests(tree: Any) -> dict[str, int]:
    """One 32-bit digest per array, equal for any sharding of it.

    The array's bits as 32-bit words, each times an odd number that depends on its
    place, summed modulo 2^32: sums of integers do not depend on their order.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    values = jax.device_get(_digest([leaf for _, leaf in leaves]))
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    return {name: int(value) for name, value in zip(names, values)}


def digest_of_meta(meta: dict) -> str:
    """SHA-256 of what is saved beside the state, but for the digest itself."""
    rest = {name: value for name, value in meta.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@jax.jit
def _digest(leaves: list[jax.Array]) -> list[jax.Array]:
    def one(x):
        if x.dtype == jnp.bool:
            x = x.astype(jnp.uint8)
        # Wider than 32 bits: bitcasting adds an axis of 32-bit words.
        word = f"uint{8 * min(x.dtype.itemsize, 4)}"
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(word))
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            place = place * np.uint32(size) + index
        return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)

    return [one(leaf) for leaf in leaves]
