"""Losses: what number should be small?

Pure functions on jax arrays: one equation each, one loss per pair out, the caller
reduces.  Log-probs come first and in the field's order, hyper-parameters are
keyword-only, and everything is computed in at least float32.  A loss declares the
arrays it reads by the names of its positional parameters.

Throughout, for a prompt x with chosen answer y_w and rejected answer y_l:

    D     log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x), the margin in nats
    h     beta D, the implicit reward margin
    s(z)  1 / (1 + exp(-z)), the logistic function
    e     the flip rate: the probability that a label is wrong
"""

from jaxpref.losses import (
    _likelihood,
    _pairwise,
    _reference_free,
    _rewards,
    _robust,
    _sequence,
)
from jaxpref.losses._likelihood import *
from jaxpref.losses._pairwise import *
from jaxpref.losses._reference_free import *
from jaxpref.losses._rewards import *
from jaxpref.losses._robust import *
from jaxpref.losses._sequence import *

# A file of the room says itself what it exports, so that a new loss touches one file.
__all__: list[str] = []
__all__ += _likelihood.__all__
__all__ += _pairwise.__all__
__all__ += _reference_free.__all__
__all__ += _rewards.__all__
__all__ += _robust.__all__
__all__ += _sequence.__all__
