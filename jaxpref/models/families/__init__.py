"""Model families: one file each, and one line in `FAMILIES`."""

from jaxpref.models.families import llama
from jaxpref.models.families.family import Family as Family
from jaxpref.models.families.family import TensorName as TensorName

FAMILIES: tuple[Family, ...] = (llama.FAMILY,)
"""All families whose folders are read and written."""
