"""What numbers are computed in, where nobody said."""

import dataclasses
from typing import Any

import jax


def with_compute_dtype(config: Any) -> Any:
    """A command's config with its compute dtype decided, and a line that tells so.

    None becomes bfloat16 on accelerators, whose products are several times as fast in
    it, and float32 on CPU.  Parameters, moments, sums and log-probs stay wide.  What is
    decided is what the config remembers from here on: a run that was begun on a TPU
    goes on elsewhere only with `--compute-dtype bfloat16`.

    float32 is not all there is to precision: a TPU computes products of float32 arrays
    out of bfloat16 parts, a GPU out of TF32, unless `JAX_DEFAULT_MATMUL_PRECISION` says
    "highest".  jax knows it as a variable of the environment, all our products (and
    their gradients) follow it, and it is what a comparison with a CPU needs.

    To be called once the other processes are joined, since it looks for devices.

    Args:
      config: of a dataclass with a field `compute_dtype`.
    """
    if config.compute_dtype is not None:
        return config
    platform = jax.default_backend()
    dtype = "float32" if platform == "cpu" else "bfloat16"
    if jax.process_index() == 0:
        print(f"compute dtype {dtype}, by default on a {platform}", flush=True)
    return dataclasses.replace(config, compute_dtype=dtype)
