"""Sampling of completions."""

from jaxpref.sampling.sampler import decode as decode
from jaxpref.sampling.sampler import generate as generate
from jaxpref.sampling.sampler import left_pad as left_pad
from jaxpref.sampling.sampler import lower as lower
