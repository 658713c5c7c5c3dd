"""What stored scores were computed with."""

import hashlib
import importlib.metadata
import os
from pathlib import Path

import jax

SCORED_BY = (
    "data/**/*.py",
    "losses/_diagnostics.py",
    "losses/_sequence.py",
    "models/**/*.py",
    "scoring/[dfght]*.py",
    "scoring/*scorer.py",
    "scoring/micro_batches.py",
    "scoring/score[_s]*.py",
    "scoring/values.py",
    "sharding.py",
)
"""The code that a score depends on; a change of it invalidates cached scores."""

WEIGHTS = "weights and dtypes"
"""Name of the model's digest in what shards say about themselves."""


def made_by(digest: str, layout: str) -> dict[str, str]:
    """Everything except the tokens that is known to affect a score's bits."""
    device = jax.devices()[0]
    code = hashlib.sha256()
    package = Path(__file__).parents[1]
    for pattern in SCORED_BY:
        for path in sorted(package.glob(pattern)):
            code.update(path.read_bytes())
    return {
        WEIGHTS: digest,
        "layout": layout,
        "device": f"{device.platform} {device.device_kind}",
        "jax": f"{jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}",
        # jax declares its options at run time.
        "precision of products": str(
            jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
        ),
        "flags": os.environ.get("XLA_FLAGS", ""),
        "jaxpref": code.hexdigest(),
    }
