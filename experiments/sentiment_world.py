"""A toy world of reviews with an exactly known gold reward.

    review   = clause "." [closing]
             | clause "and" clause "." | clause "but" clause "."
             | "although" clause "," clause "."
    clause   = "the" ASPECT "was" ["not"] [INTENSIFIER] ADJECTIVE
    closing  = "we loved it ." | "i would return ." | "i would not return ." | ...

A prompt names a place and the aspect that its reader cares about:
"cafe , mostly soup :".

The gold reward is compositional rather than a word count (after the lexicon method of
Taboada et al. 2011).  Each adjective has a value, whose sign may depend on the aspect
("a cold beer", "a cold soup").  An intensifier scales the value, and "not" reverses and
weakens it ("not awful" is faint praise).  A clause after "but" has double weight, a
clause after "although" half, and the aspect in the prompt double.  The reward is the
weighted mean over the clauses.  Text outside the grammar gets the lowest reward.
"""

import json
from pathlib import Path

import numpy as np

from jaxpref.evaluate.frontier import best_possible

PLACES = ("cafe", "hotel", "inn", "diner")
ASPECTS = ("food", "service", "room", "coffee", "soup", "beer")

# Values are from -2 to 2.  "warm" and "cold" depend on the aspect.
ADJECTIVES = (
    dict.fromkeys(("superb", "wonderful"), 2.0)
    | dict.fromkeys(("good", "nice"), 1.0)
    | dict.fromkeys(("poor", "dull"), -1.0)
    | dict.fromkeys(("awful", "horrible"), -2.0)
    | dict.fromkeys(("warm", "cold"), None)
)
WARM_VALUES = dict.fromkeys(ASPECTS, 1.0) | {"beer": -1.0}
INTENSIFIERS = {"very": 2.0, "slightly": 0.5}
NEGATION = -0.5
CLOSINGS = {
    "we loved it .": 2.0,
    "i would return .": 1.0,
    "i would not return .": -1.0,
    "we hated it .": -2.0,
}
SHARPNESS = 2.0
"""How reliably people see a difference: they rank reviews one point apart correctly 88%
of the time, s(2).  It is finite, so that DPO's optimum is finite too."""
WORST = -4.0
"""The value of text outside the grammar, equal to that of the worst possible clause."""

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = (
    *(",", "mostly", ":", "the", "was", "not", "and", "but"),
    *("although", ".", "we", "loved", "hated", "it", "i", "would", "return"),
    *PLACES,
    *ASPECTS,
    *ADJECTIVES,
    *INTENSIFIERS,
)
MAX_COMPLETION_TOKENS = 16
"""The longest review (15 words) and the end-of-text token."""


def all_prompts() -> list[str]:
    """Every prompt of the world, in a fixed order."""
    return [f"{place} , mostly {aspect} :" for place in PLACES for aspect in ASPECTS]


def clause_value(aspect: str, negated: bool, intensifier: str, adjective: str) -> float:
    """Value of one clause, in [-4, 4]."""
    value = ADJECTIVES[adjective]
    if value is None:
        value = WARM_VALUES[aspect] * (1.0 if adjective == "warm" else -1.0)
    return value * INTENSIFIERS.get(intensifier, 1.0) * (NEGATION if negated else 1.0)


def read_clause(words: list[str], start: int):
    """Read one clause at `start`: (aspect, value, next position), or None."""
    if words[start : start + 1] != ["the"] or words[start + 2 : start + 3] != ["was"]:
        return None
    aspect, at = words[start + 1], start + 3
    negated = words[at : at + 1] == ["not"]
    at += negated
    intensifier = words[at] if at < len(words) and words[at] in INTENSIFIERS else ""
    at += bool(intensifier)
    if aspect not in ASPECTS or at >= len(words) or words[at] not in ADJECTIVES:
        return None
    return aspect, clause_value(aspect, negated, intensifier, words[at]), at + 1


def read_review(words: list[str]):
    """Read a review: [(aspect or None, value, weight), ...]; None if it is not one."""
    although = words[:1] == ["although"]
    first = read_clause(words, int(although))
    if first is None:
        return None
    aspect, value, at = first
    clauses = [(aspect, value, 0.5 if although else 1.0)]
    joint = words[at] if at < len(words) else ""
    if although and joint != ",":
        return None
    if joint == "," and not although:
        return None
    if joint in (",", "and", "but"):
        second = read_clause(words, at + 1)
        if second is None:
            return None
        aspect, value, at = second
        clauses.append((aspect, value, 2.0 if joint == "but" else 1.0))
    if words[at : at + 1] != ["."]:
        return None
    closing = " ".join(words[at + 1 :])
    if closing:
        if closing not in CLOSINGS or len(clauses) > 1:
            return None
        clauses.append((None, CLOSINGS[closing], 1.0))
    return clauses


def gold_reward(prompt: str, completion: str) -> float:
    """Gold reward of any text, in [-4, 4]; `WORST` outside the grammar.

    Raises:
      ValueError: if the prompt is not one of this world.
    """
    prompt_words = prompt.split()
    if len(prompt_words) != 5 or prompt_words[3] not in ASPECTS:
        raise ValueError(f"{prompt!r} is not a prompt of this world")
    wanted = prompt_words[3]
    clauses = read_review(completion.split())
    if clauses is None:
        return WORST
    values = np.array([value for _, value, _ in clauses])
    weights = [w * (2.0 if aspect == wanted else 1.0) for aspect, _, w in clauses]
    return float(np.average(values, weights=weights))


def write_clause(rng, aspect: str, mood: float) -> str:
    """Draw one clause; `mood` is the probability that the writer intends praise."""
    negation = "not " if rng.random() < 0.25 else ""
    intensifier = rng.choice(list(INTENSIFIERS)) + " " if rng.random() < 0.4 else ""
    meant = rng.random() < mood
    while True:
        adjective = str(rng.choice(list(ADJECTIVES)))
        if (clause_value(aspect, bool(negation), "", adjective) > 0) == meant:
            return f"the {aspect} was {negation}{intensifier}{adjective}"


def write_review(rng, prompt: str) -> str:
    """Draw one review; half of the writers are pleased."""
    mood = rng.choice([0.15, 0.5, 0.85])
    wanted = prompt.split()[3]
    aspects = [str(a) for a in rng.permutation(ASPECTS)]
    if rng.random() < 0.6:  # most reviews are about the aspect in the prompt
        aspects.remove(wanted)
        aspects.insert(0, wanted)
    form = rng.choice(["one", "and", "but", "although"], p=[0.4, 0.2, 0.2, 0.2])
    first = write_clause(rng, aspects[0], mood)
    # "but" and "although" contrast two moods.
    second = write_clause(rng, aspects[1], mood if form == "and" else 1 - mood)
    review = {
        "one": f"{first} .",
        "and": f"{first} and {second} .",
        "but": f"{first} but {second} .",
        "although": f"although {second} , {first} .",
    }[form]
    if form == "one" and rng.random() < 0.7:
        pleased = rng.random() < mood
        endings = [text for text, value in CLOSINGS.items() if (value > 0) == pleased]
        review += " " + str(rng.choice(endings))
    return review


def write_reviews(count: int, seed: int) -> list[tuple[str, str]]:
    """`count` (prompt, review) pairs, with prompts drawn uniformly."""
    rng = np.random.default_rng(seed)
    prompts = all_prompts()
    drawn = [prompts[i] for i in rng.integers(len(prompts), size=count)]
    return [(prompt, write_review(rng, prompt)) for prompt in drawn]


def prefer(rewards_a, rewards_b, seed: int) -> np.ndarray:
    """Bradley-Terry labels: True where a wins, P(a wins) = s(SHARPNESS (r_a - r_b))."""
    margin = SHARPNESS * (np.asarray(rewards_a) - np.asarray(rewards_b))
    draw = np.random.default_rng(seed).random(margin.shape)
    return draw < 1.0 / (1.0 + np.exp(-margin))


def best_possible_curve(rewards: np.ndarray) -> list[dict]:
    """The exact frontier, from the reference itself to DPO's optimum at beta 1/2.

    DPO on unlimited clean labels converges to the tilt SHARPNESS / beta of the
    reference (`jaxpref.evaluate.frontier.best_possible`).

    Args:
      rewards: gold rewards of samples from the reference, [prompts, samples].

    Returns:
      Records with `tilt`, `kl`, and `reward`, in order of the KL; without those that
      the samples do not determine.
    """
    tilts = np.concatenate([[0.0], 2 * SHARPNESS * 2.0 ** np.arange(-8, 0.01, 0.125)])
    points = zip(tilts, *best_possible(rewards, tilts))
    return [
        {"tilt": float(tilt), "kl": float(kl), "reward": float(reward)}
        for tilt, kl, reward in points
        if np.isfinite(kl)
    ]


def write_jsonl(path: Path, records: list[dict]) -> None:
    """Write one record per line, atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    partial.replace(path)


def write_tokenizer(folder: Path) -> None:
    """Write a word-level tokenizer that `AutoTokenizer.from_pretrained` loads."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
