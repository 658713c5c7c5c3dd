"""The default dtype of matrix products."""

import jax

from jaxpref.runtime.processes import log


def default_compute_dtype() -> str:
    """bfloat16 on accelerators and float32 on CPU; logged.

    Accelerators multiply bfloat16 several times as fast.  Parameters, moments, sums,
    and log-probabilities stay in float32 or wider.  A run records its initial dtype: a
    run that began on a TPU resumes on a CPU only with `--compute-dtype bfloat16`.

    Even with float32, a TPU computes products from bfloat16 parts, and a GPU in TF32,
    unless `JAX_DEFAULT_MATMUL_PRECISION` is "highest".  All products and their
    gradients respect that variable; set it to compare results with a CPU.

    Call this after joining the other processes, because it queries the devices.
    """
    platform = jax.default_backend()
    dtype = "float32" if platform == "cpu" else "bfloat16"
    log(f"compute dtype {dtype}, by default on a {platform}")
    return dtype
