"""Shared test setting: eight virtual CPU devices and one compile cache for the run."""

import os
import tempfile
from pathlib import Path

from tests.virtual import xla_flags

# Before jax is imported, and also for the subprocesses that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", xla_flags())
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"jaxpref-test-cache-{os.getuid()}"),
)
# The user's own folder is left alone, and no test finds what an earlier run computed.
os.environ["JAXPREF_CACHE"] = tempfile.mkdtemp(prefix="jaxpref-test-")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# As `initialize_distributed` sets them, for tests that go around it.
os.environ.setdefault("NPROC", "64")
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "0")

import jax
import pytest

from tests.tiny import make_model_folder, make_pairs_file

SHARED = Path(__file__).resolve().parents[2] / "shared"


MAPS = Path("/proc/self/maps")
MOST_MAPS = 30_000
"""Of memory.  Linux allows a process 65,530; each compiled program takes several."""


@pytest.fixture(scope="module", autouse=True)
def release_programs():
    """Lets go of the compiled programs of a long run, which dies without maps."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("real data and models (../shared) are not on this machine")
    return SHARED


@pytest.fixture(scope="session")
def stories260k(shared) -> Path:
    """A real 260,032-parameter Llama-architecture model folder."""
    return shared / "models" / "stories260k-hf"


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A folder with a tiny `model` and `pairs.jsonl`, for runs that only read them."""
    folder = tmp_path_factory.mktemp("inputs")
    make_model_folder(folder / "model")
    make_pairs_file(folder / "pairs.jsonl")
    return folder
