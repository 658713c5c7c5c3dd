"""jaxpref: aligning language models on preference data that is wrong in places.

`jaxpref.losses` is pure functions on jax arrays and imports nothing but jax and
jaxtyping.  Everything that reads text, builds models or trains is in the other
packages and needs `pip install "jaxpref[train]"`.
"""

__version__ = "0.1.0"
