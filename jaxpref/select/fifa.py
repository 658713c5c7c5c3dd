"""FiFA: pairs with a clear margin, a good text, and a prompt unlike the others."""

import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxpref.errors import InputError
from jaxpref.select.duplicates import normalized
from jaxpref.select.opened import NO_VALUE, Opened, prompt_text
from jaxpref.select.scores import Scores, by_row

COLUMNS = 1024
"""Columns into which words are hashed."""
_BLOCK = 512  # prompts whose distances to all others are in memory at once


def importance(
    margins: Float[np.ndarray, " N"],
    qualities: Float[np.ndarray, " N"] | None,
    diversities: Float[np.ndarray, " N"],
    *,
    quality_weight: float = 1.0,
    diversity_weight: float = 1.0,
) -> Float[np.ndarray, " N"]:
    """The importance of each pair.

        importance = z(margin) + a z(quality) + b z(diversity)

    where z subtracts the mean and divides by the standard deviation (0 if that is 0).
    The paper adds the three terms as well; standardizing them is our choice, so that
    weights do not depend on the scales of the reward model and of the quality.

    Args:
      margins: reward of the chosen minus that of the rejected answer.
      qualities: quality of the text, such as a model's rating; None to leave it out.
      diversities: from `diversity`.
      quality_weight: a, >= 0.
      diversity_weight: b, >= 0.

    References:
      Yang et al., "Automated Filtering of Human Feedback Data for Aligning
      Text-to-Image Diffusion Models", 2024, arXiv:2410.10166 (FiFA).
    """
    total = _standardized(margins) + diversity_weight * _standardized(diversities)
    if qualities is not None:
        total = total + quality_weight * _standardized(qualities)
    return total


def _standardized(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    return (values - values.mean()) / (values.std() or 1.0)


def diversity(
    points: Float[np.ndarray, "N D"], neighbors: int
) -> Float[np.ndarray, " N"]:
    """Each point's term of the k-nearest-neighbor estimate of the entropy.

        diversity_n = log(1 + ||x_n - x_n^(k)||)

    where x_n^(k) is the k-th nearest other point (the farthest if there are fewer).
    The sum over points estimates the entropy up to constants (Singh et al. 2003); 1 is
    added so that repeated points have a finite term, as in Seo et al. 2021,
    arXiv:2102.09430.  Takes O(N^2 D) time and O(N) memory besides the points.
    """
    count = len(points)
    k = min(neighbors, count - 1)
    if k < 1:
        return np.zeros(count)
    norms = np.einsum("nd,nd->n", points, points)
    found = np.zeros(count)
    for start in range(0, count, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, count))
        squares = norms[rows, None] + norms - 2 * (points[rows] @ points.T)
        squares[np.arange(len(rows)), rows] = np.inf
        nearest = np.partition(squares, k - 1, axis=1)[:, k - 1]
        found[rows] = np.log1p(np.sqrt(np.maximum(nearest, 0)))
    return found


def word_vectors(texts: Sequence[str]) -> Float[np.ndarray, "N columns"]:
    """TF-IDF of the words of texts, hashed into `COLUMNS` columns; rows have norm 1.

        (1 + log count) (1 + log((1 + N) / (1 + texts with the word)))

    A word is added to one column or subtracted from it, as its hash says (Weinberger et
    al. 2009, arXiv:0902.2206), so that collisions cancel on average.
    """
    counts = [Counter(normalized(text).split()) for text in texts]
    within = Counter(word for count in counts for word in count)
    found = np.zeros((len(texts), COLUMNS), np.float32)
    for row, count in zip(found, counts):
        for word, times in count.items():
            hashed = zlib.crc32(word.encode())
            rarity = 1 + np.log((1 + len(texts)) / (1 + within[word]))
            sign = 1 if hashed & 1 else -1
            row[(hashed >> 1) % COLUMNS] += sign * (1 + np.log(times)) * rarity
    return unit(found)


def unit(points: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """The points divided by their norms; 0 stays 0."""
    norms = np.linalg.norm(points, axis=1, keepdims=True)
    return points / np.where(norms > 0, norms, 1)


def by_fifa(opened: Opened, embedded: dict[int, np.ndarray] | None) -> Scores:
    """The importance of pairs; see `importance`.

    Args:
      opened: the pairs.
      embedded: a vector of the prompt of each pair, by its number; None for TF-IDF.

    Raises:
      InputError: if no pair has a margin and, if that is read, a quality.
    """
    config = opened.config
    names = {"margin": (str(config.column), "--column")}
    if config.quality is not None:
        names["quality"] = (config.quality, "--quality")
    rows, kept, texts, reasons = [], [], [], {}
    numbers: dict[str, list[float]] = {name: [] for name in names}
    for row, index, example in opened.examples("fifa"):
        if isinstance(example, str):
            reasons[row] = example
            continue
        found = [opened.number(index, *where) for where in names.values()]
        values = [x for x in found if x is not None]
        if len(values) < len(found):
            missing = next(x for x, y in zip(names.values(), found) if y is None)
            reasons[row] = f"{NO_VALUE} of {missing[1]}"
        elif embedded is not None and index not in embedded:
            reasons[row] = "cannot be read by the model"
        else:
            rows.append(row)
            kept.append(index)
            texts.append(prompt_text(example) if embedded is None else "")
            for name, value in zip(names, values):
                numbers[name].append(value)
    if not rows:
        raise InputError(
            f"{config.named}: no pair has a number in"
            f" {' and '.join(repr(field) for field, _ in names.values())}"
        )
    if embedded is None:
        points = word_vectors(texts)
    else:
        points = unit(np.stack([embedded[index] for index in kept]))
    arrays = {name: np.array(values) for name, values in numbers.items()}
    arrays["diversity"] = diversity(points, config.neighbors)
    score = importance(
        arrays["margin"],
        arrays.get("quality"),
        arrays["diversity"],
        quality_weight=config.quality_weight,
        diversity_weight=config.diversity_weight,
    )
    return by_row(rows, {"score": score} | arrays, reasons, len(opened.file))
