"""One virtual environment per system, created if missing."""

import json
import subprocess
import sys
from pathlib import Path

PINS = {"trl": "trl 1.16.", "torch": "torch 2.13.", "tunix": "google-tunix 0.1.7"}
"""The main package of each environment, and the prefix of its version."""
# The CPU build of torch has its own index.  If that cannot be reached, pip takes the
# same version from its default index.
_TORCH = ["--extra-index-url=https://download.pytorch.org/whl/cpu", "torch==2.13.0"]
_INSTALLS = {
    "trl": [_TORCH, ["trl==1.16.*", "peft>=0.17"]],
    "torch": [_TORCH, ["transformers>=5", "safetensors", "numpy"]],
    "tunix": [["google-tunix==0.1.7"]],
    "smollm2": [["gguf", "numpy", "ml_dtypes", "safetensors", "tokenizers"]],
}


class Missing(Exception):
    """A system that cannot be run here; the message gives the reason in one line."""


def python_of(system: str, folder: Path, given: str | None) -> str:
    """The interpreter that runs a system.

    Args:
      system: "jaxpref" is run by this interpreter.
      folder: the folder of the environments, each named after its system.
      given: an interpreter to use instead.

    Raises:
      Missing: if it does not exist and cannot be installed.
    """
    if system == "jaxpref":
        return sys.executable
    if given is not None:
        return _checked(system, given)
    python = str(folder / system / "bin" / "python")
    try:
        return _checked(system, python)
    except Missing:
        make(system, folder / system)
        return _checked(system, python)


def make(name: str, folder: Path) -> str:
    """Creates an environment for a system and returns its interpreter."""
    print(f"making {folder}, once", file=sys.stderr, flush=True)
    python = str(folder / "bin" / "python")
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    for packages in _INSTALLS[name]:
        _run([python, "-m", "pip", "install", "--quiet", *packages])
    return python


def _checked(system: str, python: str) -> str:
    name, version = PINS[system].split()
    code = (
        f"import importlib.metadata as m, json; print(json.dumps(m.version({name!r})))"
    )
    found = json.loads(_run([python, "-c", code]))
    if not found.startswith(version):
        raise Missing(f"{python} has {name} {found}, not {version}")
    return python


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Missing(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line] or ["no message"]
        # pip may print warnings after the error.
        wrong = [line for line in lines if "error" in line.lower()] or lines
        raise Missing(f"{' '.join(command[:5])} ...: {wrong[-1]}"[:300])
    return done.stdout
