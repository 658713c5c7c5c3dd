"""Chunks with the place of their rows among all."""

from typing import NamedTuple

import numpy as np

from jaxpref.data.chunk import Chunk


class Piece(NamedTuple):
    """A chunk, where its rows are, and how many of its pairs are used."""

    chunk: Chunk
    source: int
    first_row: int
    first_record: int
    """The number of its first record, of those of the source."""
    used: int
    """Only the first pairs are used."""
    refused: np.ndarray
    """bool; those of them with a number that the objective refuses, to be left out."""

    def of_pairs(self, name: str) -> np.ndarray:
        """An array with a number for each pair, of those that are used."""
        return self.chunk[name][: self.used]

    def of_completions(self, name: str) -> np.ndarray:
        """An array with a number for each completion, of the pairs that are used."""
        return self.chunk[name][: self.of_pairs("counts").sum()]


def of_tokens(
    piece: Piece, name: str, mask: np.ndarray, flips: np.ndarray
) -> np.ndarray:
    """An array with a number for each token, of some of the pairs of a piece."""
    counts, prompts = piece.of_pairs("counts"), piece.of_pairs("prompt_lengths")
    lengths = piece.of_completions("lengths")
    lengths = lengths + piece.of_completions("side_prompt_lengths")
    ends = np.cumsum(counts)
    answers = np.add.reduceat(lengths, ends - counts) if len(counts) else lengths
    sizes = prompts + answers
    starts = np.cumsum(sizes) - sizes
    tokens = piece.chunk[name][: sizes.sum()]
    swapped = np.flatnonzero(flips & mask & (counts >= 2)).tolist()
    if swapped:
        tokens = tokens.copy()
    for n in swapped:
        start, (first, second) = (
            starts[n] + prompts[n],
            lengths[ends[n] - counts[n] :][:2],
        )
        end = start + first + second
        tokens[start:end] = np.roll(tokens[start:end], second)
    return tokens if mask.all() else tokens[np.repeat(mask, sizes)]
