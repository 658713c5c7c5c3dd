"""What a model will see of a dataset: lengths, copies, contradictions, and tokens."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxpref.data.dataset import PROMPTS, PreferenceDataset

QUANTILES = {"median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1.0}
"""The columns of a table of lengths."""


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What there is to know about a dataset before training on it."""

    pairs: int
    """Pairs, answers or lists."""
    lengths: dict[str, dict[str, float]]
    """Tokens of each part, by the names in `QUANTILES`, and their mean."""
    tokens: int
    """Tokens of an epoch; a prompt counts once for all its completions."""
    padded: float
    """Share of padding if every completion with its prompt were padded to the longest
    row."""
    copies: int
    """Pairs with the same content as an earlier pair."""
    contradictions: int
    """Pairs with the prompt and answers of another pair, but the opposite label."""
    longer_chosen: float | None
    """Share of pairs in which the chosen answer has more tokens; None unless the
    records are pairs."""
    prompts: int
    """Different prompts."""
    flipped: int
    """Labels that the file says are wrong."""
    annotators: dict[str, int]
    """Pairs of each annotator, most first."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Some tokens of one kind, as text."""

    text: str
    kind: str
    """"prompt", "answer", "given" for what is between the turns of an answer and not
    trained on, or "special" for a special token."""
    tokens: int


def inspect_pairs(dataset: PreferenceDataset) -> Inspection:
    """The inspection of a dataset."""
    count, sides = dataset.completion_lengths.shape
    answers = dataset.completion_lengths
    real = answers > 0  # lists may have different lengths
    parts = {"prompt": dataset.context_lengths.max(1)}
    if sides == 2:
        parts |= {"chosen": answers[:, 0], "rejected": answers[:, 1]}
    else:
        parts["answer"] = answers[real]
    rows = np.where(real, dataset.context_lengths + answers, 0)
    parts["prompt and longest answer"] = rows.max(1)
    annotators = collections.Counter(
        dataset.annotator_names[n] for n in dataset.columns["annotator"] if n >= 0
    )
    difference = answers[:, 0] - answers[:, -1]
    return Inspection(
        pairs=count,
        lengths={name: _described(values) for name, values in parts.items()},
        tokens=int(dataset.packed_lengths.sum()),
        padded=float(1 - rows.sum() / (real.sum() * rows.max())),
        copies=sum(not id.endswith("-0") for id in dataset.ids),
        contradictions=_contradictions(dataset) if sides == 2 else 0,
        longer_chosen=float((difference > 0).mean()) if sides == 2 else None,
        prompts=len(np.unique([dataset.columns[x] for x in PROMPTS])),
        flipped=int(dataset.columns["is_flipped"].sum()),
        annotators=dict(annotators.most_common()),
    )


def segments(dataset: PreferenceDataset, index: int, tokenizer: Any) -> list[list]:
    """The tokens of a pair as text: of its prompt, and of each completion.

    Args:
      dataset: the pairs.
      index: which pair.
      tokenizer: the model's tokenizer.

    Returns:
      Lists of `Segment`, whose texts together are all tokens decoded.  A completion
      comes after any prompt of its own.
    """
    prompt = dataset.prompt(index).tolist()
    found = [list(_segments([], prompt, "prompt", tokenizer))]
    for side in np.flatnonzero(dataset.completion_lengths[index]).tolist():
        own = dataset.side_prompt(index, side).tolist()
        answer = dataset.completion(index, side).tolist()
        found.append(list(_segments(prompt, own, "prompt", tokenizer)))
        before, end = prompt + own, 0
        trained = np.isin(np.arange(len(answer)), dataset.targets(index, side))
        for is_trained, run in itertools.groupby(trained.tolist()):
            start, end = end, end + len(list(run))
            kind = "answer" if is_trained else "given"
            tokens = answer[start:end]
            found[-1] += _segments(before + answer[:start], tokens, kind, tokenizer)
    return found


def _segments(
    before: list[int], tokens: list[int], kind: str, tokenizer: Any
) -> Iterator[Segment]:
    """The tokens after `before`, one segment for each run between special tokens."""
    special = set(tokenizer.all_special_ids)
    start = 0
    while start < len(tokens):
        end = start + 1
        if tokens[start] not in special:
            while end < len(tokens) and tokens[end] not in special:
                end += 1
        text = _decoded(before + tokens[:start], tokens[start:end], tokenizer)
        is_special = tokens[start] in special
        yield Segment(text, "special" if is_special else kind, end - start)
        start = end


def _decoded(before: list[int], tokens: list[int], tokenizer: Any) -> str:
    """What tokens add to the text of those before them, such as a first space."""
    decode = lambda ids: tokenizer.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    context = before[-8:]
    whole, start = decode(context + tokens), decode(context)
    return whole[len(start) :] if whole.startswith(start) else decode(tokens)


def _described(values: np.ndarray) -> dict[str, float]:
    described = {name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}
    return {"mean": float(values.mean())} | described


def _contradictions(dataset: PreferenceDataset) -> int:
    keys = dataset.completion_keys()
    ordered = {(a, b) for a, b in keys}
    return sum((b, a) in ordered for a, b in keys)
