"""How similar texts are, for minimum Bayes risk."""

import collections
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

WORD = re.compile(r"\w+")


def unigram_f1(texts: Sequence[str]) -> Float[np.ndarray, "n n"]:
    """The F1 of the words that two texts have in common (ROUGE-1; Lin 2004, W04-1013).

        u(a, b) = 2 sum_w min(a_w, b_w) / (|a| + |b|)

    a_w is how often the word w occurs in a, and |a| is the number of words in a.  Case
    and punctuation do not count.

    Args:
        texts: n texts.  A language without spaces has long words, so that only texts
            with whole phrases in common are similar.

    Returns:
        Symmetric, in [0, 1]; 0 for a text without words, also with itself.
    """
    counts = [collections.Counter(WORD.findall(text.casefold())) for text in texts]
    found = np.zeros((len(texts), len(texts)))
    for i, a in enumerate(counts):
        for j, b in enumerate(counts[: i + 1]):
            if both := (a & b).total():
                found[i, j] = found[j, i] = 2 * both / (a.total() + b.total())
    return found
