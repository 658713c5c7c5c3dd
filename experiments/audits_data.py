"""Preference files of `experiments.audits`, and the flips of their labels."""

import dataclasses
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpref.data.hashing import hash_uniforms
from jaxpref.errors import InputError, first_line

Record = dict[str, Any]

SYMMETRIC, BY_ANNOTATOR = NOISES = ("symmetric", "by annotator")
"""Kinds of noise: the same rate for all labels, or two rates."""
ANNOTATORS = 20
"""Simulated annotators of a file that names none."""


def plain(rows: Sequence[Record]) -> Iterator[Record]:
    """Files that `jaxpref` reads as they are."""
    for row in rows:
        yield {k: row[k] for k in ("prompt", "chosen", "rejected") if k in row}


def one_vote(rows: Sequence[Record]) -> Iterator[Record]:
    """UKPConvArg1: one of the votes on each pair, at random; ties are left out."""
    draws = hash_uniforms((row["id"] for row in rows), salt="vote")
    for row, draw in zip(rows, draws):
        label = row["votes"][int(draw * len(row["votes"]))]["label"]
        if label != "equal":
            prompt = f"{row['title']}\n\n{row['stance']}"
            yield _ordered(prompt, row["a1"], row["a2"], label == "a1")


def all_votes(rows: Sequence[Record]) -> Iterator[Record]:
    """MT-bench: every vote that is not a tie; turns are joined."""
    for row in rows:
        prompt, a, b = ("\n\n".join(row[name]) for name in ("prompt", "a", "b"))
        for vote in row["votes"]:
            if vote["winner"] != "tie":
                record = _ordered(prompt, a, b, vote["winner"] == "a")
                yield record | {"annotator": vote["judge"]}


def conversations(rows: Sequence[Record]) -> Iterator[Record]:
    """LLaMA-Factory: turns with `from` and `value`, joined."""
    for row in rows:
        turns = (f"{turn['from']}: {turn['value']}" for turn in row["conversations"])
        answers = (row[name]["value"] for name in ("chosen", "rejected"))
        yield _ordered("\n\n".join(turns), *answers, True)


def comparisons(rows: Sequence[Record]) -> Iterator[Record]:
    """Fine-grained RLHF: the six pairs of four answers; ties are left out."""
    places = ((1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4))
    for row in rows:
        for (first, second), preferred in zip(places, row["preference"]):
            answers = [row[f"prediction {n}"] for n in (first, second)]
            if preferred and answers[0] != answers[1]:
                yield _ordered(row["question"], *answers, preferred == 1)


def _ordered(prompt: str, first: str, second: str, prefers_first: bool) -> Record:
    chosen, rejected = (first, second) if prefers_first else (second, first)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


FILES: dict[str, tuple[str, Callable[[Sequence[Record]], Iterator[Record]]]] = {
    "HH helpful-base": ("hh_rlhf_helpful_base_test.jsonl.gz", plain),
    "UltraFeedback": ("ultrafeedback_sample_train.jsonl.gz", plain),
    "UKP, one vote per pair": ("ukpconvarg1_votes.jsonl.gz", one_vote),
    "MT-bench votes": ("mtbench_human_pairs.jsonl.gz", all_votes),
    "GSM8K solutions": ("gsm8k_solution_pairs.jsonl.gz", plain),
    "LLaMA-Factory": ("llamafactory_dpo_en_demo.json", conversations),
    "QA feedback": ("finegrained_qa_feedback_dev.json", comparisons),
}
"""The file of each dataset, and how its records become preference records."""


def read(folder: Path, name: str, *, most: int) -> list[Record]:
    """At most this many labels of a dataset, at random but always the same.

    Raises:
      InputError: if the file cannot be read.
    """
    file, convert = FILES[name]
    path = folder / file
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
        lines = text.splitlines() if ".jsonl" in path.suffixes else ()
        rows = [json.loads(line) for line in lines] or json.loads(text)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from error
    records = list(convert(rows))
    draws = hash_uniforms(map(str, range(len(records))), salt="part")
    return [records[n] for n in np.sort(np.argsort(draws)[:most])]


@dataclasses.dataclass(frozen=True)
class Plant:
    """Which of N labels are flipped, and who gave them."""

    flips: np.ndarray
    """bool [N]."""
    annotators: Sequence[str | None]
    """The name of each label's annotator."""


def plant(
    annotators: Sequence[str | None], *, rate: float, noise: str, seed: int
) -> Plant:
    """Draws the labels to flip.

    Args:
      annotators: of each label; None if the file names none.
      rate: the mean flip rate.
      noise: one of `NOISES`.  By annotator, half of them (of the file, or simulated)
        have twice the rate of the others.
      seed: of the draw of flips, and of the annotators with the higher rate.
    """
    rng = np.random.default_rng([seed, round(1000 * rate), NOISES.index(noise)])
    rates = np.full(len(annotators), rate)
    if noise == BY_ANNOTATOR:
        simulated = [f"a{n}" for n in rng.integers(ANNOTATORS, size=len(annotators))]
        pairs = zip(annotators, simulated)
        annotators = [made if name is None else name for name, made in pairs]
        known = rng.permutation(sorted(set(annotators)))
        worse = np.isin(annotators, known[: len(known) // 2])
        rates = np.where(worse, 2.0, 1.0)
        rates *= rate / rates.mean()
    return Plant(rng.random(len(annotators)) < rates, annotators)
