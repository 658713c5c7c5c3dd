"""Does it fit that pod, and how fast could it be, before anyone pays?

The train step and the reference pass of a run, and the sampler, are compiled for
devices that are only described, from shapes alone, by the compiler that the devices
would use.
"""

from jaxpref.plan.command import run as run
from jaxpref.plan.config import PlanConfig as PlanConfig
