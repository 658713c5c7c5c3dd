"""Models: tokens to hidden states and token log-probs.

`build(architecture, numerics)` returns a `Model`, whose methods are pure functions of a
pytree of parameters.  An `Architecture` is defined by a family (`families.llama`) and
created in code or read from a Hugging Face folder (`folder`).
"""

from jaxpref.models.architecture import Architecture as Architecture
from jaxpref.models.functional import Model as Model
from jaxpref.models.functional import Params as Params
from jaxpref.models.functional import build as build
from jaxpref.models.logprobs import token_logps as token_logps
from jaxpref.models.numerics import Numerics as Numerics
from jaxpref.models.reward import RewardModel as RewardModel
