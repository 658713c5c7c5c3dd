"""Repeated records: equal texts, and texts with many common word n-grams.

Near-duplicates are found by MinHash with banding, and their similarity is then counted:
random hashing only decides which texts are compared.
"""

import collections
import hashlib
import itertools
import json
import re
import unicodedata
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxpref.data.records import Example
from jaxpref.select.opened import Opened, prompt_text
from jaxpref.select.scores import Scores

SAME = "same text as an earlier record"
SIMILAR = "nearly the text of an earlier record"
WORDS = 3
"""Words of an n-gram."""
HASHES = 128
"""Hash functions of a signature."""
MISSED = 0.01
"""Highest probability that two texts at the threshold are never compared."""
PRIME = 2**31 - 1
"""Modulus of the hash functions; products of two residues fit into 64 bits."""
_WORD = re.compile(r"\w+|[^\w\s]")


def by_duplicates(opened: Opened) -> Scores:
    """No scores: a record that repeats an earlier one that is kept is left out.

    Records of different annotators are different votes, and so no duplicates of each
    other, unless only prompts are compared.
    """
    config, count = opened.config, len(opened.file)
    reasons = ["no pair"] * count
    of: list[int | None] = [None] * count
    shared: list[float | None] = [None] * count
    exact: dict[bytes, int] = {}
    near: dict[str, NearDuplicates] = {}
    reads = opened.examples("duplicates")
    for row, group in itertools.groupby(reads, key=lambda read: read.row):
        found = [read.example for read in group]
        examples = [x for x in found if isinstance(x, Example)]
        if not examples:
            reasons[row] = str(found[0])
            continue
        reasons[row] = ""
        texts, owner = _compared(examples, config.of)
        key = hashlib.blake2b(json.dumps([*texts, owner]).encode(), digest_size=16)
        first = exact.setdefault(key.digest(), row)
        if first != row:
            reasons[row], of[row], shared[row] = SAME, first + 1, 1.0
        elif config.similarity < 1:
            others = near.setdefault(
                owner, NearDuplicates(config.similarity, seed=config.seed)
            )
            if (like := others.add("\n".join(texts), row)) is not None:
                reasons[row], of[row], shared[row] = SIMILAR, like[0] + 1, like[1]
                # What repeats this record repeats the one that is kept.
                exact[key.digest()] = like[0]
    return Scores(np.zeros(count), reasons, {"duplicate_of": of, "similarity": shared})


def _compared(examples: Sequence[Example], of: str) -> tuple[list[str], str]:
    """The texts of a record that are compared, and its annotator."""
    if of == "prompt":
        return [*dict.fromkeys(normalized(prompt_text(x)) for x in examples)], ""
    texts = [
        normalized(text)
        for example in examples
        for text in (prompt_text(example), *example.texts, *map(str, example.traces))
    ]
    return texts, " ".join(str(x.annotator) for x in examples)


def normalized(text: str) -> str:
    """The text without differences of case, whitespace, or Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class NearDuplicates:
    """Texts seen so far, of which none is a near-duplicate of another.

    Two texts are near-duplicates if the Jaccard similarity of their sets of word
    n-grams is at least a threshold t.  A signature has the smallest values of `HASHES`
    random hash functions.  It is cut into b bands of r values; texts that agree in a
    band are compared, which misses a pair of similarity t with probability
    (1 - t^r)^b.

    References:
      Broder, "On the Resemblance and Containment of Documents", 1997 (MinHash).
      Leskovec et al., "Mining of Massive Datasets", 2014, section 3.4 (banding).
    """

    def __init__(self, threshold: float, *, seed: int):
        """`threshold` is t, above 0 and below 1; `seed` draws the hash functions."""
        self._threshold, self._width = threshold, band_width(threshold)
        rng = np.random.default_rng(seed)
        self._scale = rng.integers(1, PRIME, (HASHES, 1))
        self._shift = rng.integers(0, PRIME, (HASHES, 1))
        self._bands: dict[tuple[int, bytes], list[int]] = collections.defaultdict(list)
        self._grams: dict[int, np.ndarray] = {}

    def add(self, text: str, row: int) -> tuple[int, float] | None:
        """The most similar earlier text's row and similarity if it is a near-duplicate.

        Otherwise None, and the text is remembered under its row.
        """
        grams = n_grams(text)
        values = (self._scale * grams + self._shift) % PRIME
        signature = values.min(axis=1).astype(np.int32)
        starts = range(0, HASHES - self._width + 1, self._width)
        bands = [(n, signature[n : n + self._width].tobytes()) for n in starts]
        like = {other for band in bands for other in self._bands.get(band, ())}
        # The earliest of the most similar ones.
        best = max(((self._similarity(grams, x), -x) for x in like), default=(0.0, 0))
        if best[0] >= self._threshold:
            return -best[1], best[0]
        self._grams[row] = grams
        for band in bands:
            self._bands[band].append(row)
        return None

    def _similarity(self, grams: np.ndarray, row: int) -> float:
        other = self._grams[row]
        common = len(np.intersect1d(grams, other, assume_unique=True))
        return common / (len(grams) + len(other) - common)


def n_grams(text: str) -> Int[np.ndarray, " grams"]:
    """The set of a text's word n-grams as 31-bit hashes, int64, sorted.

    A text of fewer than `WORDS` words is one n-gram.
    """
    words = _WORD.findall(text)
    last = max(len(words) - WORDS, 0)
    grams = (" ".join(words[n : n + WORDS]) for n in range(last + 1))
    hashes = {zlib.crc32(gram.encode()) % PRIME for gram in grams}
    return np.array(sorted(hashes), np.int64)


def band_width(threshold: float) -> int:
    """The largest r for which at most a share `MISSED` of the pairs is missed."""
    missed = lambda r: (1 - threshold**r) ** (HASHES // r)
    return max((r for r in range(1, HASHES + 1) if missed(r) <= MISSED), default=1)
