"""A folder of inputs to spoil one thing at a time, and the complaint about it."""

import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

SHORT = ["--max-new-tokens", "8"]
PADDED = ["--row-length", "none"]


class Inputs:
    """A folder with a model and pairs that work, to spoil one thing at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model, self.data = folder / "model", folder / "pairs.jsonl"
        self.out = folder / "run"

    def train(self, *options, **changes) -> list[str]:
        """The command that works, with options added and changed."""
        typed = {str(word)[2:] for word in options if str(word).startswith("--")}
        if "eval-data" in typed:  # it replaces the held-out share
            typed.add("heldout-fraction")
        settings = {
            "model": self.model,
            "data": self.data,
            "out": self.out,
            "max-length": 64,
            "max-prompt-length": 32,
            "heldout-fraction": 0.2,
            "max-steps": 4,
            "batch-size": 8,
            "eval-every": 2,
            "save-every": 2,
            "log-every": 1,
            "mesh.data": 2,
            "mesh.tensor": 2,
        } | {name.replace("_", "-"): value for name, value in changes.items()}
        flags = [
            part
            for name, value in settings.items()
            if name not in typed
            for part in (f"--{name}", str(value))
        ]
        return ["train", *flags, *map(str, options)]

    def tensors(self) -> dict[str, np.ndarray]:
        return load_file(self.model / "model.safetensors")

    def write_tensors(self, tensors: dict[str, np.ndarray]) -> None:
        path = self.model / "model.safetensors"
        path.unlink()  # it may still be mapped
        contiguous = {name: np.array(value) for name, value in tensors.items()}
        save_file(contiguous, path)


def the_complaint(err: str, *fragments: str, tracebacks: bool = False) -> str:
    """The one line `jaxpref: error: ...`, which must be the last one.

    With `tracebacks`, other threads write too, and its start may share their line.
    """
    assert tracebacks or ("Traceback" not in err and "╭" not in err)
    lines = [line for line in err.splitlines() if line.strip()]
    complaints = re.findall("jaxpref: error: .*", err)
    assert len(complaints) == 1, err
    assert tracebacks or lines[-1] == complaints[0], err
    for fragment in fragments:
        assert fragment in complaints[0], complaints[0]
    return complaints[0]
