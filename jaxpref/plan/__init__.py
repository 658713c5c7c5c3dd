"""Memory and time estimates of a run, without the devices that it needs.

Compiles the train step, the reference pass, and the sampler from shapes alone, with the
compiler of the target devices.
"""

from jaxpref.plan.command import run as run
from jaxpref.plan.config import PlanConfig as PlanConfig
