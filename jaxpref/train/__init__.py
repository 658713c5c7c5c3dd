"""How one step happens, and how a run is carried through."""

from jaxpref.objectives.objective import Objective as Objective
from jaxpref.objectives.objective import beta_dpo as beta_dpo
from jaxpref.objectives.objective import from_loss as from_loss
from jaxpref.objectives.objective import reward_regression as reward_regression
from jaxpref.objectives.objective import sft as sft
from jaxpref.objectives.objective import trainable as trainable
from jaxpref.runtime.mesh import MeshConfig as MeshConfig
from jaxpref.runtime.mesh import initialize_distributed as initialize_distributed
from jaxpref.runtime.mesh import make_mesh as make_mesh
from jaxpref.train.config import TrainConfig as TrainConfig
from jaxpref.train.loop import run as run
from jaxpref.train.metrics import read_metrics as read_metrics
from jaxpref.train.optimizer import Decay as Decay
from jaxpref.train.optimizer import Optimizer as Optimizer
from jaxpref.train.optimizer import OptimizerConfig as OptimizerConfig
