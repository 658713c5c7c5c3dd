"""Preference losses as pure functions on jax arrays.

Each function implements one equation and returns one loss per pair; the caller reduces.
Arrays are positional, log-probs first, and hyperparameters are keyword-only.  All
computations use at least float32.  The names of the positional parameters declare which
arrays a loss reads.

A hyperparameter is one number.  If a loss treats pairs independently, it may also be an
array that broadcasts to one number per pair, such as a beta or a flip rate of each
pair's own.  The range of Python numbers is checked, that of arrays is not.

Throughout, for a prompt x with chosen answer y_w and rejected answer y_l:

    D     log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x), the margin in nats
    h     beta D, the implicit reward margin
    s(z)  1 / (1 + exp(-z)), the logistic function
    e     the flip rate: the probability that a label is wrong
"""

from jaxpref.losses import (
    _advantages,
    _asymmetric,
    _batch,
    _calibration,
    _corrections,
    _degree,
    _diagnostics,
    _distillation,
    _divergence,
    _dynamic_beta,
    _dynamic_targets,
    _general_preference,
    _goal_contrast,
    _ipo,
    _kl,
    _length,
    _likelihood,
    _listwise,
    _pairwise,
    _policy_gradient,
    _reference_free,
    _reward_models,
    _rewards,
    _robust,
    _sequence,
    _sides,
    _symmetric,
    _token,
    _token_advantages,
    _unpaired,
    _weights,
)
from jaxpref.losses._advantages import *
from jaxpref.losses._asymmetric import *
from jaxpref.losses._batch import *
from jaxpref.losses._calibration import *
from jaxpref.losses._corrections import *
from jaxpref.losses._degree import *
from jaxpref.losses._diagnostics import *
from jaxpref.losses._distillation import *
from jaxpref.losses._divergence import *
from jaxpref.losses._dynamic_beta import *
from jaxpref.losses._dynamic_targets import *
from jaxpref.losses._general_preference import *
from jaxpref.losses._goal_contrast import *
from jaxpref.losses._ipo import *
from jaxpref.losses._kl import *
from jaxpref.losses._length import *
from jaxpref.losses._likelihood import *
from jaxpref.losses._listwise import *
from jaxpref.losses._pairwise import *
from jaxpref.losses._policy_gradient import *
from jaxpref.losses._reference_free import *
from jaxpref.losses._reward_models import *
from jaxpref.losses._rewards import *
from jaxpref.losses._robust import *
from jaxpref.losses._sequence import *
from jaxpref.losses._sides import *
from jaxpref.losses._symmetric import *
from jaxpref.losses._token import *
from jaxpref.losses._token_advantages import *
from jaxpref.losses._unpaired import *
from jaxpref.losses._weights import *

# Each file lists its own exports, so that adding a loss touches a single file.
__all__: list[str] = []
__all__ += _advantages.__all__
__all__ += _token_advantages.__all__
__all__ += _asymmetric.__all__
__all__ += _batch.__all__
__all__ += _calibration.__all__
__all__ += _corrections.__all__
__all__ += _degree.__all__
__all__ += _diagnostics.__all__
__all__ += _distillation.__all__
__all__ += _divergence.__all__
__all__ += _dynamic_beta.__all__
__all__ += _dynamic_targets.__all__
__all__ += _general_preference.__all__
__all__ += _goal_contrast.__all__
__all__ += _ipo.__all__
__all__ += _kl.__all__
__all__ += _length.__all__
__all__ += _likelihood.__all__
__all__ += _listwise.__all__
__all__ += _pairwise.__all__
__all__ += _policy_gradient.__all__
__all__ += _reference_free.__all__
__all__ += _reward_models.__all__
__all__ += _rewards.__all__
__all__ += _robust.__all__
__all__ += _sequence.__all__
__all__ += _sides.__all__
__all__ += _symmetric.__all__
__all__ += _token.__all__
__all__ += _unpaired.__all__
__all__ += _weights.__all__
