"""Makes tests/data/mergekit.npz: what mergekit makes of three tiny models.

mergekit is installed in an environment of its own, because it needs other versions of
the libraries that are used here; the figures are of mergekit 0.1.5 on torch 2.13.0:

    python -m venv mergekit && mergekit/bin/pip install torch==2.13.0 mergekit==0.1.5
    python -m tests.data.make_mergekit mergekit/bin/mergekit-yaml
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.tiny import make_model_folder

FILE = Path(__file__).with_name("mergekit.npz")
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_heads": 2,
    "num_kv_heads": 1,
}
MERGES = {
    "linear": {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": 0.6}},
            {"model": "b", "parameters": {"weight": 0.3}},
            {"model": "c", "parameters": {"weight": 0.9}},
        ],
    },
    "slerp": {
        "merge_method": "slerp",
        "models": [{"model": "a"}, {"model": "b"}],
        "base_model": "a",
        "parameters": {"t": 0.3},
    },
    "task": {
        "merge_method": "task_arithmetic",
        "models": [
            {"model": "a", "parameters": {"weight": 1.5}},
            {"model": "b", "parameters": {"weight": -0.5}},
        ],
        "base_model": "c",
    },
}
"""The configs of mergekit, by the name of our method."""


def make_models(folder: Path) -> None:
    """The three models: a, b, and c."""
    for seed, name in enumerate("abc"):
        make_model_folder(folder / name, seed, **SIZES)


def main() -> None:
    """Runs mergekit and writes the file."""
    command = Path(sys.argv[1]).resolve()
    arrays = {}
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        make_models(folder)
        for name, config in MERGES.items():
            file = folder / f"{name}.json"  # JSON is YAML
            file.write_text(json.dumps(config | {"dtype": "float32"}))
            words = [command, file, folder / name, "--no-write-model-card"]
            subprocess.run(words, check=True, cwd=folder)
            merged = {}
            for part in (folder / name).glob("*.safetensors"):
                merged |= load_file(part)
            arrays |= {f"{name}/{tensor}": x for tensor, x in merged.items()}
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
