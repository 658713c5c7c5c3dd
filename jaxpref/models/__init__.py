"""Models: tokens to hidden states and token log-probs.

The transformer is written in Flax NNX and used functionally: `build(config)` gives a
`Model`, whose methods are pure functions of a pytree of parameters.
"""

from jaxpref.models.config import ModelConfig as ModelConfig
from jaxpref.models.config import RopeScaling as RopeScaling
from jaxpref.models.functional import Model as Model
from jaxpref.models.functional import Params as Params
from jaxpref.models.functional import build as build
from jaxpref.models.logprobs import token_logps as token_logps
from jaxpref.models.reward import RewardModel as RewardModel
