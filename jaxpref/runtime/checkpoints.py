"""Checkpoints: a state and its metadata in one Orbax step, verified by digests.

Each records what it was made with, and a run that differs refuses it.
"""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxpref.errors import InputError, first_line
from jaxpref.runtime import heartbeat
from jaxpref.runtime.digests import digest_of_meta, digests
from jaxpref.runtime.processes import (
    broadcast_from_process_zero,
    failing_processes,
)
from jaxpref.runtime.provenance import (
    NOTHING,
    Provenance,
    differences,
    from_json,
    to_json,
)

PAUSES = 0.0, 1.0, 4.0
"""Seconds to wait before each attempt to read a checkpoint."""

Tree = Any
"""A pytree of arrays."""

_log = logging.getLogger("jaxpref")


class CheckpointError(InputError):
    """A checkpoint could not be written or read."""


class Checkpoints:
    """The `checkpoints/` folder of a run."""

    def __init__(self, folder: Path, *, keep: int, made_by: Provenance = NOTHING):
        """Opens the folder, creating it if needed.

        Args:
          folder: the folder.
          keep: number of newest steps to keep.
          made_by: what this run computes with; steps of another run are refused.
        """
        self.folder, self._keep, self._made_by = folder, keep, made_by
        self.best: int | None = None
        """A step that is kept even when newer ones exist."""
        self._writing: int | None = None
        options = ocp.CheckpointManagerOptions(preservation_policy=self, create=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        """Tells Orbax which of the steps, oldest first, to keep."""
        newest = len(checkpoints) - self._keep
        return [n >= newest or c.step == self.best for n, c in enumerate(checkpoints)]

    def latest_step(self) -> int | None:
        """The newest complete step on disk, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Tree, data: dict) -> None:
        """Starts writing a copy of one step; training continues in the meantime.

        Raises:
          CheckpointError: if there is not enough disk space, or if this or the previous
            step could not be written.
        """
        if step in self._manager.all_steps():
            return
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            self._raise(OSError(f"{needed:,} bytes needed, {free:,} free"))
        meta = {
            "made_by": to_json(self._made_by),
            "step": step,
            "data": data,
            "digests": digests(state),
        }
        meta["digest"] = digest_of_meta(meta)
        try:
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(jax.tree.map(_stored, state)),
                    meta=ocp.args.JsonSave(meta),
                ),
            )
        except Exception as error:
            self._raise(error)
        if not saved:
            self._raise(OSError(f"step {step} was refused"))
        self._is_complete()  # the previous step, which Orbax has waited for
        self._writing = step

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
          CheckpointError: if something could not be written.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            self._raise(error)
        self._is_complete()

    def restore(
        self, abstract: Tree, *, only: int | None = None
    ) -> tuple[Tree, dict] | None:
        """The newest intact step with its data position; None if there are no steps.

        Every array is compared with the digest taken before it was written.  If any
        process cannot read a step, or finds that it does not match, the step is
        reported and all processes try the previous one.  Once an intact step is found,
        newer steps that do not match are deleted.  A step that could not be read after
        several attempts may still be intact; it is moved to `unreadable/` next to the
        folder.

        Args:
          abstract: shapes, dtypes and shardings to restore to.
          only: restore this step and no other.

        Raises:
          CheckpointError: if a step was made by another run, before anything is moved
            or deleted, or if there are steps, but none that is intact.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        steps = _steps_of_process_zero(steps if only is None else [only])
        unreadable = []
        for number, step in enumerate(steps):
            found, complaint = self._read(step, abstract)
            unable = failing_processes(found is not None)
            if found is None or unable:
                where = f"reported by process {unable[0]}"
                _warn(unable, "%d cannot be read (%s)", step, complaint or where)
                unreadable.append(step)
                continue
            state, meta = found
            now = digests(state)
            expected = meta.get("digests", {})
            wrong = [name for name in now if now[name] != expected.get(name)]
            if is_damaged(meta):
                wrong.append("meta/metadata")
            if unable := failing_processes(not wrong):
                what = wrong[0] if wrong else f"what process {unable[0]} read"
                differs = "%d is damaged: %s differs from what was saved"
                _warn(unable, differs, step, what)
                continue
            if only is None:
                self._clear(steps[:number], unreadable)
            return state, meta["data"]
        if only is not None:
            raise CheckpointError(f"{self.folder}: step {only} cannot be restored")
        if steps:
            raise CheckpointError(
                f"{self.folder}: none of the checkpoints {steps} can be restored; "
                "move the folder away to start over"
            )
        return None

    def _read(self, step: int, abstract: Tree) -> tuple[tuple[Tree, dict] | None, str]:
        """This process's part of a step with its metadata, or the reason for failure.

        Reads without the manager, which blocks all other processes if one cannot read.
        """
        folder, why = self._manager.directory / str(step), ""
        for pause in PAUSES:  # a network file system may be briefly unavailable
            time.sleep(pause)
            heartbeat.beat(f"reading checkpoint {step}")
            try:
                meta = json.loads((folder / "meta" / "metadata").read_text())
                if not meta.keys() >= {"data", "digests"}:
                    raise ValueError("meta/metadata is incomplete")
                self._check_origin(step, meta)
                state = ocp.StandardCheckpointHandler().restore(
                    folder / "state",
                    args=ocp.args.StandardRestore(jax.tree.map(_as_stored, abstract)),
                )
                state = jax.tree.map(_unstored, state, abstract)
            except CheckpointError:
                raise
            except Exception as error:
                why = first_line(error)
            else:
                return (state, meta), ""
        return None, why

    def _check_origin(self, step: int, meta: dict) -> None:
        """Refuses the step of another run; does nothing if its metadata is damaged."""
        if is_damaged(meta):
            return
        if "made_by" not in meta:
            raise CheckpointError(
                f"{self.folder}: step {step} was saved by an earlier version, which "
                "did not record its inputs; finish the run with that version, or use "
                "another --out"
            )
        if meta["step"] != step:
            raise CheckpointError(
                f"{self.folder}: step {step} is step {meta['step']} under another "
                "name; rename its folder"
            )
        if changed := differences(from_json(meta["made_by"]), self._made_by):
            raise CheckpointError(
                f"{self.folder}: step {step} was made with other inputs; changed: "
                f"{', '.join(changed)}. Put them back to resume, or use another --out"
            )

    def _clear(self, steps: list[int], unreadable: list[int]) -> None:
        """Deletes damaged steps and moves unreadable ones to `unreadable/`."""
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
        multihost_utils.sync_global_devices("damaged checkpoints were removed")
        self._manager.reload()

    def close(self) -> None:
        """Waits for pending writes and closes the folder."""
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
            raise error  # another process died; freeing disk space would not help
        latest = self.latest_step()
        again = "start again" if latest is None else f"resume from step {latest}"
        raise CheckpointError(
            f"{self.folder}: a checkpoint could not be written ({first_line(error)}); "
            f"free some space and run the same command to {again}"
        ) from error


# Orbax does not save arrays of size 0; one zero stands for each of them.


def _stored(array: jax.Array) -> jax.Array:
    if array.size:
        return array
    return jax.device_put(np.zeros(1, array.dtype), _as_stored(array).sharding)


def _as_stored(array: Any) -> Any:
    """Shape, dtype and sharding of an array in a checkpoint."""
    if array.size:
        return array
    sharding = array.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct((1,), array.dtype, sharding=sharding)


def _unstored(stored: jax.Array, abstract: Any) -> jax.Array:
    if abstract.size:
        return stored
    return jax.device_put(np.zeros(abstract.shape, abstract.dtype), abstract.sharding)


def is_damaged(meta: dict) -> bool:
    """Whether metadata differ from what was saved; earlier versions had no digest."""
    return "made_by" in meta and meta.get("digest") != digest_of_meta(meta)


def _steps_of_process_zero(steps: list[int], *, most: int = 64) -> list[int]:
    """The steps that process 0 sees; other processes may see different ones."""
    mine = np.full(most, -1, np.int32)
    mine[: len(steps[:most])] = steps[:most]
    return [int(step) for step in broadcast_from_process_zero(mine) if step >= 0]


def _warn(unable: list[int], message: str, *args) -> None:
    """Warns on process 0 and on the first failing process only."""
    if jax.process_index() in (0, unable[0]):
        _log.warning(f"checkpoint {message}", *args)
