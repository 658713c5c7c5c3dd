"""Training: the step, the loop, and the run around them."""

from jaxpref.runtime.mesh import MeshConfig as MeshConfig
from jaxpref.runtime.mesh import initialize_distributed as initialize_distributed
from jaxpref.runtime.mesh import make_mesh as make_mesh
from jaxpref.runtime.metrics_file import read_metrics as read_metrics
from jaxpref.train.config import TrainConfig as TrainConfig
from jaxpref.train.fit import fit as fit
from jaxpref.train.optimizer import Decay as Decay
from jaxpref.train.optimizer import Optimizer as Optimizer
from jaxpref.train.optimizer import OptimizerConfig as OptimizerConfig
from jaxpref.train.prepare import prepare as prepare
from jaxpref.train.run import run as run
from jaxpref.train.task import Task as Task
