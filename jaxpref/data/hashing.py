"""Decisions by hash: which pair is flipped, which prompt is held out.

A decision depends only on the content of one pair.  It does not change when rows are
added, removed or reordered, and it is the same in every process and after a resume.
"""

import hashlib
from collections.abc import Iterable

import numpy as np


def hash_uniforms(keys: Iterable[str], *, salt: str) -> np.ndarray:
    """One number in [0, 1) per key: SHA-256 of salt and key, its first 53 bits.

    Args:
      keys: the strings to decide about.
      salt: the name of the decision; another salt gives independent numbers.

    Returns:
      float64 [len(keys)].
    """
    digests = (hashlib.sha256(f"{salt}\n{key}".encode()).digest() for key in keys)
    words = (int.from_bytes(digest[:8], "big") >> 11 for digest in digests)
    return np.fromiter(words, np.float64) * 2.0**-53
