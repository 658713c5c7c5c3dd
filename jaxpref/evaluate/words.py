"""TF-IDF of answers: which words an answer uses, and how rare they are."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxpref.evaluate.surface import WORD

VOCABULARY = 2000
"""Number of words with a column."""
LEAST = 3
"""How many answers a word must occur in."""
DIRECTIONS = 200
"""Number of columns after `principal`."""
ROUNDS = 4
"""Subspace iterations of `principal`."""


def word_differences(
    answers: Sequence[tuple[str, str]], *, vocabulary: int = VOCABULARY
) -> Float[np.ndarray, "pairs words"]:
    """TF-IDF of the most frequent words, preferred minus other answer.

        (1 + log count) (1 + log((1 + answers) / (1 + answers with the word)))

    divided by the norm of the answer.  The vocabulary holds the words that occur in
    most answers.  Neither it nor the weights depend on the labels.

    Args:
      answers: the preferred and the other answer of each pair.
      vocabulary: number of words, at most.

    Returns:
      float32 [pairs, words]; words that occur in fewer than `LEAST` answers have no
      column.
    """
    counts = [Counter(WORD.findall(x.lower())) for pair in answers for x in pair]
    within: Counter[str] = Counter()
    for count in counts:
        within.update(count.keys())
    known = [w for w, n in within.items() if n >= LEAST]
    # Ties are broken by the word, so that the order of the rows does not matter.
    known = sorted(known, key=lambda word: (-within[word], word))[:vocabulary]
    column = {word: place for place, word in enumerate(known)}
    frequency = np.array([within[word] for word in known])
    rarity = 1 + np.log((1 + len(counts)) / (1 + frequency))
    found = np.zeros((len(answers), len(known)), np.float32)
    for number, count in enumerate(counts):
        places = [column[word] for word in count if word in column]
        times = np.array([count[word] for word in count if word in column])
        values = (1 + np.log(times)) * rarity[places] if places else np.zeros(0)
        size = np.linalg.norm(values) or 1.0
        sign = 1 if number % 2 == 0 else -1
        found[number // 2, places] += sign * values / size
    return found


def principal(
    differences: Float[np.ndarray, "pairs words"], *, directions: int = DIRECTIONS
) -> Float[np.ndarray, "pairs directions"]:
    """The coordinates of rows in the directions in which they vary most (LSA).

    Exchanging the answers of a pair, which is what a label does, only changes the signs
    of its row: X'X, and so the directions, do not depend on the labels.

    Args:
      differences: X, one row per pair.
      directions: number of columns to keep; with fewer columns, X is returned.

    References:
      Halko et al., "Finding Structure with Randomness", 2011, arXiv:0909.4061,
      algorithm 4.4 (subspace iteration).
    """
    width = differences.shape[1]
    if width <= directions:
        return differences.astype(np.float64)
    basis = np.random.default_rng(0).normal(size=(width, directions))
    for _ in range(ROUNDS):
        basis, _ = np.linalg.qr(basis)
        basis = differences.T @ (differences @ basis.astype(differences.dtype))
    basis, _ = np.linalg.qr(basis)
    return (differences @ basis).astype(np.float64)
