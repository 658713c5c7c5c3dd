"""Reading a part of a checkpoint of another run, which may still be training."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxpref.errors import InputError, first_line
from jaxpref.runtime.checkpoints import Tree, is_damaged
from jaxpref.runtime.digests import digests
from jaxpref.runtime.heartbeat import beat
from jaxpref.runtime.processes import broadcast_from_process_zero


def newest_step(folder: Path) -> Path | None:
    """The newest complete step in a `checkpoints/` folder, or None if it has none.

    All processes must call this; they get what the first one finds.
    """
    step = newest_local_step(folder)
    newest = int(broadcast_from_process_zero(np.int32(-1 if step is None else step)))
    return None if newest < 0 else folder / str(newest)


def newest_local_step(folder: Path) -> int | None:
    """The newest complete step that this process finds, or None if there is none."""
    # Orbax gives a step its number once it is complete.
    steps = [int(x.name) for x in folder.glob("*") if x.name.isdecimal()]
    return max(steps, default=None)


def read_meta(step: Path) -> dict[str, Any]:
    """What a checkpoint says about itself: `made_by`, `digests`, `digest`, and more.

    Raises:
      InputError: if it cannot be read, has changed since it was saved, or was saved by
        a version that did not record its inputs.
    """
    try:
        meta = json.loads((step / "meta" / "metadata").read_text("utf-8"))
        if not meta.keys() >= {"made_by", "digests", "digest"} or is_damaged(meta):
            raise ValueError("its metadata are incomplete or damaged")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{step}: not a readable checkpoint ({first_line(error)}); pass another "
            "step, or let the run finish and pass its folder"
        ) from None
    return meta


Shapes = dict[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of each array, by its path."""


def shapes_of(tree: Tree) -> Shapes:
    """Shapes and dtypes of arrays or their abstract values."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    path_of = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return {path_of(path): (tuple(x.shape), str(x.dtype)) for path, x in leaves}


def saved_shapes(step: Path, name: str) -> Shapes:
    """Those of a field of a saved state; reads no array.

    Raises:
      InputError: if the checkpoint cannot be read.
    """
    try:
        handler = ocp.PyTreeCheckpointHandler()
        found: Any = handler.metadata(
            # Orbax refuses relative paths here.
            step.absolute() / "state"  # pyright: ignore[reportArgumentType]
        )
        return shapes_of(found.tree[name])
    except Exception as error:  # whatever Orbax and its storage raise
        raise InputError(
            f"{step}: not a readable checkpoint ({first_line(error)}); pass another "
            "step"
        ) from error


def read_part(step: Path, name: str, abstract: Tree) -> Tree:
    """One field of a saved state, compared with its digests; nothing else is read.

    Args:
      step: the folder of the step.
      name: the field, such as "params".
      abstract: shapes, dtypes and shardings to restore to; the dtypes are those saved.

    Raises:
      InputError: if it cannot be read, or is not what was saved.
    """
    beat(f"reading {step}: {name}")
    expected = read_meta(step)["digests"]
    wanted = {name: abstract}
    try:
        found = ocp.PyTreeCheckpointHandler().restore(
            step.absolute() / "state",  # pyright: ignore[reportArgumentType]  any path works
            args=ocp.args.PyTreeRestore(
                wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            ),
        )[name]
    except Exception as error:  # whatever Orbax and its storage raise
        raise InputError(
            f"{step}: its {name} cannot be read ({first_line(error)}); pass another "
            "step"
        ) from error
    prefix = f".{name}"
    now = {prefix + path: value for path, value in digests(found).items()}
    inside = (f"{prefix}[", f"{prefix}.")
    saved = {path: x for path, x in expected.items() if path.startswith(inside)}
    if wrong := [x for x in {**now, **saved} if now.get(x) != saved.get(x)]:
        raise InputError(
            f"{step}: is damaged: {wrong[0]} differs from what was saved; pass another "
            "step"
        )
    return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(found))
