"""Groups of prompts that are held out together.

If the answers of a record follow two prompts, neither may be on the other side of the
split.  All prompts that records connect, directly or through others, are therefore one
group.
"""

import numpy as np

from jaxpref.data.hashing import hash_uniforms


class PromptGroups:
    """Groups of connected prompts; a prompt that is in none is a group of its own.

    The group with more than half of the records that have two prompts is always
    trained on.  Otherwise, a group is held out by the hash of its smallest member, so
    that the order of the records does not matter.
    """

    def __init__(self, first: np.ndarray, second: np.ndarray):
        """Groups the prompts of N records by their hashes, int64 [N]."""
        self._members, places = np.unique(
            np.concatenate([first, second]), return_inverse=True
        )
        ends = places[: len(first)], places[len(first) :]
        self._group = _connected(*ends, len(self._members))
        self.count = int(self._group.max(initial=-1)) + 1
        sizes = np.bincount(self._group[ends[0]], minlength=self.count)
        self.records = len(first)
        """Records with two prompts."""
        self.most = int(sizes.max(initial=0))
        """Those of the largest group."""
        # Members are sorted, so the first one of a group is the smallest.
        least = self._members[np.unique(self._group, return_index=True)[1]]
        self._uniforms = hash_uniforms([f"group {x}" for x in least], salt="heldout")
        if 2 * self.most > self.records:
            self._uniforms[np.argmax(sizes)] = 1.0

    def uniforms(self, prompts: np.ndarray, alone: np.ndarray) -> np.ndarray:
        """Numbers that decide on which side of the split pairs are, float64 [M].

        Args:
          prompts: the hashes of their first prompts, int64 [M].
          alone: the numbers of prompts that are in no group.
        """
        if not self.records:
            return alone
        places = np.searchsorted(self._members, prompts)
        places = np.minimum(places, len(self._members) - 1)
        found = self._members[places] == prompts
        return np.where(found, self._uniforms[self._group[places]], alone)

    def describe(self) -> str:
        """How many records and groups there are."""
        return (
            f"{self.records:,} records have two prompts; their prompts form"
            f" {self.count:,} groups, which are held out as a whole; the largest has"
            f" {self.most:,} records"
        )


def _connected(first: np.ndarray, second: np.ndarray, size: int) -> np.ndarray:
    """The number of each node's component in a graph with these edges, int64 [size]."""
    parents = list(range(size))

    def root(node: int) -> int:
        while parents[node] != node:
            parents[node] = node = parents[parents[node]]
        return node

    for ends in zip(first.tolist(), second.tolist(), strict=True):
        low, high = sorted(map(root, ends))
        parents[high] = low
    roots = np.array([root(node) for node in range(size)], np.int64)
    return np.unique(roots, return_inverse=True)[1]
