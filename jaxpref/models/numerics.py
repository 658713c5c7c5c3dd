"""How a model computes: dtypes, rematerialization and the choice of attention."""

import dataclasses

from jaxpref.errors import InputError
from jaxpref.models.architecture import at_least, check_minimums

FLOATS = ("float32", "bfloat16", "float16", "float64")
REMAT = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How the function of an `Architecture` is computed.

    Parameters are stored in `param_dtype` and cast to `compute_dtype` where they are
    used.  Norms, rotary angles, the softmax over keys, and log-probs are computed in
    float32 or wider; the cosines and sines of the angles and the attention weights are
    then rounded to `compute_dtype`, as in transformers.
    """

    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    remat: str = "none"
    """What the backward pass recomputes within a layer: "none", "dots" (everything
    except products with weights) or "full" (everything)."""
    unroll: int = at_least(1, default=1)
    """Layers to unroll per iteration of the scan over layers; at most all of them."""
    twice_differentiable: bool = False
    """Whether the gradient is differentiated again.  Attention is then dense, since
    blockwise attention and accelerator kernels have no second derivatives."""

    def __post_init__(self):
        check_minimums(self, "numerics")
        for name in ("param_dtype", "compute_dtype"):
            if (value := getattr(self, name)) not in FLOATS:
                raise InputError(f"numerics: {name} is {value!r}; use one of {FLOATS}")
        if self.remat not in REMAT:
            raise InputError(
                f"numerics: remat is {self.remat!r}; use none, dots or full"
            )


FLOAT32 = Numerics()
"""The defaults."""
