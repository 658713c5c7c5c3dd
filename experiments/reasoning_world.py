"""A toy world of reasoning: three numbers are added, two of them first.

    prompt = "3 4 1 ="                   (x, y and z, from 0 to 4; 125 prompts)
    trace  = FILLER NAME NAME SUM        ("so x z 4": x + z makes 4; 108 traces)
    answer = NUMBER                      (0 to 12)

A trace states which two numbers are added first, in which order, and their sum; the
answer adds the third.  Filler and order are irrelevant, and the trace may be wrong.
There are few enough traces to sum over all of them, so the probability of an answer
under a model is a finite sum.  The gold reward depends only on the answer: 1 if it is
right, else 0.

The demonstrations are careless.  Each sum is right with probability `CAREFUL`, and an
answer without a trace with `CARELESS`; otherwise it is off by one.  So a model trained
on them can still learn from preferences.
"""

import itertools
from pathlib import Path

import numpy as np

LARGEST = 4
"""Range of the numbers in a prompt."""
NUMBERS = tuple(map(str, range(3 * LARGEST + 1)))
"""The answers; the first ones are also in prompts and traces."""
NAMES = ("x", "y", "z")
FILLERS = ("so", "well")
CAREFUL = 0.7
CARELESS = 0.4

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
MARKERS = ("<think>", "</think>")
WORDS = ("=", *NUMBERS, *NAMES, *FILLERS)
VOCABULARY = (*SPECIAL, *MARKERS, *WORDS)


def all_prompts() -> list[str]:
    """Every prompt of the world, in a fixed order."""
    given = itertools.product(NUMBERS[: LARGEST + 1], repeat=3)
    return [" ".join((*numbers, "=")) for numbers in given]


def all_traces() -> list[str]:
    """The trace language, in a fixed order: the same for every prompt."""
    return [
        f"{filler} {first} {second} {claim}"
        for filler in FILLERS
        for first, second in itertools.permutations(NAMES, 2)
        for claim in NUMBERS[: 2 * LARGEST + 1]
    ]


def numbers(prompt: str) -> tuple[int, int, int]:
    """The three numbers of a prompt.

    Raises:
      ValueError: if the prompt is not one of this world.
    """
    words = prompt.split()
    allowed = {*NUMBERS[: LARGEST + 1]}
    if len(words) != 4 or words[3] != "=" or not {*words[:3]} <= allowed:
        raise ValueError(f"{prompt!r} is not a prompt of this world")
    x, y, z = map(int, words[:3])
    return x, y, z


def gold_reward(prompt: str, answer: str) -> float:
    """1 if the answer is right, else 0, for any text.

    Raises:
      ValueError: if the prompt is not one of this world.
    """
    return float(answer.strip() == str(sum(numbers(prompt))))


def gold_rewards(prompts: list[str]) -> np.ndarray:
    """The gold reward of every answer, [prompts, 13]."""
    return np.array([[gold_reward(p, number) for number in NUMBERS] for p in prompts])


def slip(rng, right: int, careful: float, *, largest: int) -> int:
    """`right` with probability `careful`, else off by one, from 0 to `largest`."""
    if rng.random() < careful:
        return right
    off = right + rng.choice([-1, 1])
    return int(off if 0 <= off <= largest else 2 * right - off)


def write_trace(rng, prompt: str) -> tuple[str, str]:
    """A careless trace and the answer after it."""
    values = dict(zip(NAMES, numbers(prompt)))
    first, second, third = map(str, rng.permutation(NAMES))
    most = 2 * LARGEST, 3 * LARGEST
    claim = slip(rng, values[first] + values[second], CAREFUL, largest=most[0])
    answer = slip(rng, claim + values[third], CAREFUL, largest=most[1])
    return f"{rng.choice(FILLERS)} {first} {second} {claim}", str(answer)


def write_demonstrations(count: int, seed: int) -> list[dict]:
    """`count` prompts with completions, every other one without a trace.

    An empty trace is part of the prompt, so that the model does not learn to write one.
    """
    rng = np.random.default_rng(seed)
    prompts = all_prompts()
    rows = []
    for n, index in enumerate(rng.integers(len(prompts), size=count)):
        prompt = prompts[index]
        opened, closed = MARKERS
        if n % 2:
            answer = slip(rng, sum(numbers(prompt)), CARELESS, largest=3 * LARGEST)
            rows.append({"prompt": prompt + opened + closed, "completion": f"{answer}"})
        else:
            trace, answer = write_trace(rng, prompt)
            whole = opened + trace + closed + answer
            rows.append({"prompt": prompt, "completion": whole})
    return rows


def trace_pair(prompt: str, chosen: tuple[str, str], rejected: tuple[str, str]) -> dict:
    """The record of a pair from its sides (trace, answer)."""
    sides = {"chosen": chosen, "rejected": rejected}
    named = {k: {"trace": t, "answer": a} for k, (t, a) in sides.items()}
    return {"prompt": prompt, **named}


def split_prompts() -> tuple[np.ndarray, np.ndarray]:
    """Indices of 100 prompts for training pairs and of 25 held-out prompts.

    In the held-out prompts, every number is as frequent in each position as overall.
    """
    x, y, z = np.array([numbers(prompt) for prompt in all_prompts()]).T
    held = (x + 2 * y + 3 * z) % (LARGEST + 1) == 3
    return np.flatnonzero(~held), np.flatnonzero(held)


def draw_pairs(rng, joint, empty, prompts, count: int):
    """Pairs of sampled answers with different rewards, with and without traces.

    Args:
      rng: a NumPy generator.
      joint: log pi(r, y|x), [n, R, M], of the reference.
      empty: log pi(y|x, empty trace), [n, M].
      prompts: int [n], the prompts of the rows.
      count: pairs of each kind.

    Returns:
      Two arrays int [count, 5]: the prompt, the chosen and the rejected answer, and
      their traces; the last two are 0 without traces.
    """
    rewards = gold_rewards(all_prompts())[prompts]

    def pairs(logps):
        of_row = np.exp(logps.reshape(len(logps), -1).astype(np.float64))
        bounds = np.cumsum(of_row / of_row.sum(axis=1, keepdims=True), axis=1)
        found = []
        while len(found) < count:
            row = rng.integers(len(prompts))
            drawn = np.searchsorted(bounds[row], rng.random(2) * bounds[row, -1])
            traces, answers = np.divmod(drawn, len(NUMBERS))
            first, second = rewards[row, answers]
            if first != second:
                order = [0, 1] if first > second else [1, 0]
                found.append([prompts[row], *answers[order], *traces[order]])
        return np.array(found)

    return pairs(joint), pairs(empty)


def write_tokenizer(folder: Path) -> None:
    """Write a word-level tokenizer that `AutoTokenizer.from_pretrained` loads."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    # Special tokens need no whitespace around them.
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in MARKERS])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
