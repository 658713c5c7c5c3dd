"""The dtype of matrix products, where the user gives none."""

import jax

from jaxpref.runtime.processes import log


def default_compute_dtype() -> str:
    """bfloat16 on accelerators and float32 on CPU; logged.

    Accelerators multiply bfloat16 several times as fast.  Parameters, moments, sums and
    log-probabilities stay float32 or wider.  A run records the dtype it began with: one
    begun on a TPU resumes elsewhere only with `--compute-dtype bfloat16`.

    float32 is not all there is to precision: a TPU computes products of float32 arrays
    from bfloat16 parts, a GPU from TF32, unless `JAX_DEFAULT_MATMUL_PRECISION` is
    "highest".  All our products and their gradients follow that variable; a comparison
    with a CPU needs it.

    To be called once the other processes are joined, since it looks for devices.
    """
    platform = jax.default_backend()
    dtype = "float32" if platform == "cpu" else "bfloat16"
    log(f"compute dtype {dtype}, by default on a {platform}")
    return dtype
