"""The default compute dtype."""

import dataclasses
from typing import Any

import jax


def with_compute_dtype(config: Any) -> Any:
    """Fills in the compute dtype of a command's config, and prints the choice.

    None becomes bfloat16 on accelerators, whose matrix products are several times as
    fast in it, and float32 on CPU.  Parameters, moments, sums, and log-probs stay in
    float32.  The choice becomes part of the config: a run that began on a TPU resumes
    on other hardware only with `--compute-dtype bfloat16`.

    Even products of float32 arrays are not exact: a TPU computes them from bfloat16
    parts and a GPU in TF32, unless `JAX_DEFAULT_MATMUL_PRECISION` is "highest".  This
    environment variable applies to all products and their gradients.  Set it to compare
    numbers with a CPU.

    Must be called after the other processes have joined, because it queries devices.

    Args:
      config: a dataclass with a field `compute_dtype`.
    """
    if config.compute_dtype is not None:
        return config
    platform = jax.default_backend()
    dtype = "float32" if platform == "cpu" else "bfloat16"
    if jax.process_index() == 0:
        print(f"compute dtype {dtype} (the default on {platform})", flush=True)
    return dataclasses.replace(config, compute_dtype=dtype)
