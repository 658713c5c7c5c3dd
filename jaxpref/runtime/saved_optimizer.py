"""The optimizer's state of an earlier run, from which another run starts."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from jaxpref.errors import InputError
from jaxpref.files import RUN, kind_of
from jaxpref.runtime import processes
from jaxpref.runtime.checkpoints import Tree
from jaxpref.runtime.provenance import Content
from jaxpref.runtime.saved_parts import (
    Shapes,
    newest_local_step,
    read_meta,
    read_part,
    saved_shapes,
    shapes_of,
)

CHECKPOINTS, FIELD = "checkpoints", "opt_state"


@dataclasses.dataclass(frozen=True)
class SavedOptimizer:
    """The optimizer's state in a checkpoint."""

    name: str
    """As the user wrote it."""
    step: Path
    """The step's folder, RUN/checkpoints/STEP."""
    digest: str
    """SHA-256 (hex) of what the step says about itself and its arrays."""

    @property
    def content(self) -> Content:
        """What a run that starts from it depends on."""
        return Content(self.digest, self.name)

    def check(self, abstract: Tree) -> None:
        """Compares shapes and dtypes with those of `abstract`; reads no array.

        Raises:
          InputError: if it is the state of another optimizer or of other parameters, or
            cannot be read.
        """
        wanted, found = shapes_of(abstract), saved_shapes(self.step, FIELD)
        if wanted != found:
            raise InputError(
                f"--optimizer-from {self.name}: {_difference(found, wanted)}; use the "
                "options with which that run was trained, or leave it out"
            )

    def read(self, abstract: Tree) -> Tree:
        """The state, in the shapes, dtypes and shardings of `abstract`.

        Raises:
          InputError: see `check`; or if an array cannot be read.
        """
        self.check(abstract)
        return read_part(self.step, FIELD, abstract)


def saved_optimizer(name: str | None) -> SavedOptimizer | None:
    """The optimizer's state of a run.

    All processes must call this.

    Args:
      name: the folder RUN of a run, for the checkpoint of the step that it exports
        (the best one with --export best, else the newest one), or
        RUN/checkpoints/STEP; None for none.

    Raises:
      InputError: if there is no such checkpoint.
    """
    if name is None:
        return None
    folder = Path(name)
    number = processes.together(lambda: _step_of(folder))
    number = np.int32(-1 if number is None else number)
    number = int(processes.broadcast_from_process_zero(number))
    if number < 0:
        raise InputError(
            f"--optimizer-from {name}: no run with a checkpoint; pass the --out of a "
            "run, or RUN/checkpoints/STEP"
        )
    is_step = folder.parent.name == CHECKPOINTS
    step = folder if is_step else folder / CHECKPOINTS / str(number)
    return SavedOptimizer(name, step, read_meta(step)["digest"])


def _step_of(folder: Path) -> int | None:
    """The step of a checkpoint or of the export of a run; None if there is none."""
    if folder.parent.name == CHECKPOINTS:
        is_step = folder.is_dir() and folder.name.isdecimal()
        return int(folder.name) if is_step else None
    if not folder.is_dir() or kind_of(folder) != RUN:
        return None
    fields = lambda name: json.loads((folder / name).read_text("utf-8"))
    best = folder / "best.json"
    if fields("config.json").get("export") == "best" and best.is_file():
        return int(fields(best.name)["step"])
    return newest_local_step(folder / CHECKPOINTS)


def _difference(found: Shapes, wanted: Shapes) -> str:
    """How the saved state differs from that of this run, in words."""
    names = _optimizer_of(found), _optimizer_of(wanted)
    if names[0] != names[1]:
        return f"is the state of {names[0]}, but this run uses {names[1]}"
    if found.keys() == wanted.keys():
        array = min(x for x in found if found[x] != wanted[x])
        (shape, dtype), (own_shape, own_dtype) = found[array], wanted[array]
        if shape == own_shape:
            return (
                f"its array {array} is {dtype}, but that of this run is {own_dtype} "
                "(--param-dtype or --adam-mu-dtype)"
            )
        return (
            f"is the state of other parameters: its array {array} has the shape "
            f"{list(shape)}, but that of this run has {list(own_shape)}"
        )
    if _is_rounded(found) != _is_rounded(wanted):
        which = "bfloat16 parameters, but those of this run are not bfloat16"
        if _is_rounded(wanted):
            which = "parameters in another dtype than bfloat16, that of this run"
        return f"is the state of {which} (--param-dtype)"
    array = min(found.keys() ^ wanted.keys())
    which = "it has" if array in found else "it lacks"
    return f"is the state of other parameters: {which} the array {array}"


def _optimizer_of(shapes: Shapes) -> str:
    """The optimizer that has these arrays."""
    fields = {part for path in shapes for part in path.split(".")}
    known = {"mu": "AdamW", "v_row": "Adafactor"}
    return next((x for field, x in known.items() if field in fields), "another one")


def _is_rounded(shapes: Shapes) -> bool:
    """Whether the state counts stochastic roundings, of bfloat16 parameters."""
    return any(path.startswith("inner.") for path in shapes)
