"""UKPConvArg1: which of two arguments is more convincing, with five votes per pair.

Habernal and Gurevych, "Which argument is more convincing?", ACL 2016; CC-BY 4.0.
12,935 pairs of 797 arguments in 24 topics (12 questions with two stances each) and
3,700 workers.  Ties, a quarter of the votes, are counted and left out.
"""

import dataclasses
import gzip
import itertools
import json
import re
import zlib
from pathlib import Path

import numpy as np

from jaxpref.errors import InputError, first_line
from jaxpref.files import write_whole

HELD_BACK = (
    "Ban Plastic Water Bottles",
    "Firefox vs. Internet Explorer",
    "Is it better to have a lousy father or to be fatherless?",
)
"""Questions (six topics) whose gold labels were used to choose settings."""

_BUCKETS = 2**15
_WORD = re.compile(r"[A-Za-z']+")
_KINDS_OF_WORDS = [
    set(words.split())
    for words in (
        "because therefore however although though thus hence since so moreover also "
        "furthermore example instance while whereas if then but first second finally",
        "i me my we us our i'm im",
        "you your u ur you're",
        "should must can could would may might will shall need",
        "not no never don't dont can't cant isn't won't doesn't nothing",
        "u ur lol omg r dont cant im wat y cuz coz gonna wanna ppl thats doesnt isnt",
    )
]


@dataclasses.dataclass(frozen=True)
class World:
    """P pairs of arguments and V votes that are not ties; topics are padded to S."""

    texts: list[list[str]]
    """The arguments of each topic."""
    topics: np.ndarray
    """int [P]; topic of each pair."""
    first: np.ndarray
    """int [P]; index of the first argument in its topic."""
    second: np.ndarray
    """int [P]."""
    gold: np.ndarray
    """int [P]; 1 first, -1 second, 0 equal or unknown."""
    held_back: np.ndarray
    """bool [P]; pairs whose gold was used to choose settings."""
    pairs: np.ndarray
    """int [V]; the pair of each vote, ascending."""
    workers: np.ndarray
    """int [V]."""
    signs: np.ndarray
    """int [V]; 1 for the first argument, -1 for the second."""
    names: list[str]
    """The workers' names."""
    ties: int
    """Number of ties, which are left out."""


def read(path: str | Path) -> World:
    """The votes, from the gzipped JSON lines.

    Raises:
      InputError: if the file cannot be read or is malformed.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path}: cannot be read ({first_line(error)}); --data names "
            "ukpconvarg1_votes.jsonl.gz, which `python -m benchmarks.inputs ukp` makes"
        ) from error
    names = sorted({vote["worker"] for row in rows for vote in row["votes"]})
    worker = {name: n for n, name in enumerate(names)}
    topic = {name: n for n, name in enumerate(sorted({row["topic"] for row in rows}))}
    found: list[dict[str, str]] = [{} for _ in topic]
    for row in rows:
        for name, side in zip(row["id"].split("_"), ("a1", "a2")):
            found[topic[row["topic"]]].setdefault(name, row[side])
    places = [{name: n for n, name in enumerate(texts)} for texts in found]
    at = np.array(
        [
            [places[topic[row["topic"]]][name] for name in row["id"].split("_")]
            for row in rows
        ]
    )
    votes = [
        (n, worker[vote["worker"]], 1 if vote["label"] == "a1" else -1)
        for n, row in enumerate(rows)
        for vote in row["votes"]
        if vote["label"] != "equal"
    ]
    pairs, workers, signs = (np.array(column) for column in zip(*votes))
    return World(
        texts=[list(texts.values()) for texts in found],
        topics=np.array([topic[row["topic"]] for row in rows]),
        first=at[:, 0],
        second=at[:, 1],
        gold=np.array([{"a1": 1, "a2": -1}.get(row["gold"], 0) for row in rows]),
        held_back=np.array([row["title"] in HELD_BACK for row in rows]),
        pairs=pairs,
        workers=workers,
        signs=signs,
        names=names,
        ties=sum(len(row["votes"]) for row in rows) - len(votes),
    )


def write_stand_in(path: Path, *, topics: int = 6, size: int = 14) -> None:
    """Writes made-up votes in the form of the real ones, for a sanity check.

    Longer arguments tend to be better, and workers differ in how often they are wrong.
    """
    rng = np.random.default_rng(0)
    words = "because people should think about money health school time home".split()
    workers = {f"w{n:02}": rate for n, rate in enumerate(rng.uniform(0, 0.4, 16))}
    rows = []
    for topic in range(topics):
        lengths = rng.integers(8, 40, size)
        texts = [" ".join(rng.choice(words, length)) for length in lengths]
        for a, b in itertools.combinations(range(size), 2):
            better = lengths[a] + rng.normal(0, 4) > lengths[b]
            votes = [
                {"worker": name, "label": "a1" if better != wrong else "a2"}
                for name in rng.choice(list(workers), 5, replace=False).tolist()
                for wrong in [bool(rng.random() < workers[name])]
            ]
            rows.append(
                {
                    "id": f"arg{topic}{a:02}_arg{topic}{b:02}",
                    "topic": f"topic {topic}",
                    "title": f"question {topic // 2}",
                    "a1": texts[a],
                    "a2": texts[b],
                    "gold": "a1" if better else "a2",
                    "votes": votes,
                }
            )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(path, gzip.compress(text.encode(), mtime=0))


def draw(world: World, votes: int, *, seed: int) -> np.ndarray:
    """A random choice of votes, with a maximum number per pair: bool [V]."""
    order = np.lexsort(
        (np.random.default_rng(seed).random(len(world.pairs)), world.pairs)
    )
    rank = np.empty(len(order), int)
    begins = np.searchsorted(world.pairs, world.pairs)
    rank[order] = np.arange(len(order)) - begins
    return rank < votes


def length_features(world: World) -> np.ndarray:
    """Logarithms of words and characters, standardized; [T, S, 2]."""
    return _padded(
        world,
        _scaled([[np.log1p(len(t.split())), np.log1p(len(t))] for t in _all(world)]),
    )


def text_features(world: World, *, dimensions: int) -> np.ndarray:
    """Principal components of the text features of arguments; [T, S, dimensions].

    There are three parts: 35 numbers on length, punctuation, spelling, and kinds of
    words; TF-IDF of words and pairs of words; TF-IDF of 2 to 4 characters.  The TF-IDF
    parts are hashed, and each has half the weight of the first.  Texts of all topics
    are used, but no labels.
    """
    texts = _all(world)
    parts = (
        (1.0, _scaled([_surface(text) for text in texts])),
        (0.5, _tfidf([_words(text) for text in texts])),
        (0.5, _tfidf([_characters(text) for text in texts])),
    )
    kernel = np.zeros((len(texts), len(texts)))
    for weight, x in parts:
        products = x @ x.T
        kernel += weight * products / np.mean(np.diag(products))
    values, vectors = np.linalg.eigh(kernel)
    top = slice(-dimensions, None)
    return _padded(world, vectors[:, top] * np.sqrt(np.maximum(values[top], 0)))


def _all(world: World) -> list[str]:
    return [text for texts in world.texts for text in texts]


def _padded(world: World, flat: np.ndarray) -> np.ndarray:
    """[arguments, d] to [T, S, d], padded with zeros."""
    sizes = [len(texts) for texts in world.texts]
    padded = np.zeros((len(sizes), max(sizes), flat.shape[1]))
    for n, rows in enumerate(np.split(flat, np.cumsum(sizes)[:-1])):
        padded[n, : len(rows)] = rows
    return padded


def _scaled(rows) -> np.ndarray:
    x = np.array(rows, np.float64)
    return (x - x.mean(0)) / (x.std(0) + 1e-9)


def _surface(text: str) -> list[float]:
    words = _WORD.findall(text)
    lower = [word.lower() for word in words]
    n, c = max(len(words), 1), max(len(text), 1)
    sentences = max(len([x for x in re.split(r"[.!?]+", text) if x.strip()]), 1)
    long = sum(len(word) > 6 for word in words)
    kinds = [sum(word in kind for word in lower) for kind in _KINDS_OF_WORDS]
    marks = [text.count(mark) for mark in '!?,"(\n']
    return [
        *np.log1p([len(words), len(text), sentences, len(set(lower)), long, *marks]),
        *(mark / c for mark in marks[:3]),
        *(kind / n for kind in kinds),
        np.log1p(kinds[0]),
        len(words) / sentences,
        sum(map(len, words)) / n,
        len(set(lower)) / n,
        long / n,
        sum(x.isupper() for x in text) / c,
        sum(word.isupper() and len(word) > 1 for word in words) / n,
        sum(word == "i" for word in words) / n,
        sum(x.isdigit() for x in text) / c,
        len(re.findall(r"\.\.+", text)) / c,
        len(re.findall(r"  +", text)) / c,
        float(text[:1].isupper()),
        float(text.rstrip()[-1:] in (".", "!", "?")),
        float("http" in text or "www" in text),
        float(len(words) < 8),
    ]


def _words(text: str) -> list[str]:
    words = re.findall(r"[a-z']+|[.!?,]", text.lower())
    return words + [f"{a} {b}" for a, b in zip(words, words[1:])]


def _characters(text: str) -> list[str]:
    text = f" {text} "
    return [text[n : n + k] for k in (2, 3, 4) for n in range(len(text) - k + 1)]


def _tfidf(documents: list[list[str]]) -> np.ndarray:
    counts = np.zeros((len(documents), _BUCKETS), np.float32)
    for n, grams in enumerate(documents):
        buckets = [zlib.crc32(gram.encode()) % _BUCKETS for gram in grams]
        np.add.at(counts[n], buckets, 1)
    seen = (counts > 0).sum(0)
    x = np.log1p(counts) * np.log((1 + len(documents)) / (1 + seen))
    return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-9)
