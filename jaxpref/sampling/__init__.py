"""Sampling of completions."""

from jaxpref.sampling.batch import Answers as Answers
from jaxpref.sampling.batch import decode as decode
from jaxpref.sampling.batch import generate as generate
from jaxpref.sampling.batch import lower as lower
from jaxpref.sampling.batch import pad as pad
from jaxpref.sampling.continuous import Answer as Answer
from jaxpref.sampling.continuous import Request as Request
from jaxpref.sampling.continuous import answer_all as answer_all
from jaxpref.sampling.mixture import Mixed as Mixed
from jaxpref.sampling.mixture import Mixture as Mixture
from jaxpref.sampling.slots import Rule as Rule
