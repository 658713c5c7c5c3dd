"""What is measured after each round: held-out answers, and the labels."""

from collections.abc import Callable, Sequence
from pathlib import Path

from jaxpref.online.rounds.config import RoundsConfig
from jaxpref.online.rounds.recipe import Recipe

ANSWERS = "heldout_answers.jsonl"
"""The answers to the held-out prompts, one each, at temperature 1."""
SCORED = "heldout_scored.jsonl"
"""The same with the judge's rewards."""
LOG_RATIOS = "heldout_log_ratios.jsonl"
"""The same with log p(answer) minus that of the model before training."""
JUDGED = "judged_pairs.jsonl"
"""The round's pairs with the judge's rewards."""
HELDOUT = "heldout_prompts.jsonl"
"""The prompts, in the folder of round 0."""
OF_MODEL = ("batch-size", "compute-dtype", "max-length", "mesh.", "template")
"""Options of the user for `score` that all measurements follow."""
OF_ANSWERS = (
    *("max-new-tokens", "thinking", "raw", "batch-size", "compute-dtype"),
    *("mesh.", "template"),
)
"""Options of the user for `sample` that the held-out answers follow.  They are drawn
from the model's own distribution, so that their log-ratios estimate a KL."""
OF_RECIPE = ("--max-new-tokens", "--thinking", "--raw")
"""Those that they take from the recipe."""


def evaluation_commands(
    config: RoundsConfig,
    n: int,
    judge: Sequence[str],
    commands: Sequence[Sequence[str]],
    override: Callable[..., list[str]],
    recipe: Recipe,
) -> list[list[str]]:
    """The commands that measure the model of a round.

    Args:
      config: the options.
      n: the round.
      judge: the options of the reward that judges, as words.
      commands: of the round.
      override: changes options of a command to those of the user, or only some.
      recipe: where the commands come from.
    """
    folder = Path(config.out) / f"round_{n}"
    model = config.model
    is_trained = any(f"{folder}/policy" in words for words in commands)
    if is_trained:
        model = f"{folder}/policy/export"
    score = lambda source, words, out, only: override(
        ["score", "--data", str(source), *words, "--out", f"{folder}/{out}"], only=only
    )
    # The options of --gold come before those of the recipe's own scores.
    given = lambda name: any(word.startswith(f"--{name}") for word in judge)
    judged = [name for name in (*OF_MODEL, "answer-after") if not given(name)]
    found = []
    if config.eval_prompts:
        heldout = Path(config.out) / "round_0" / HELDOUT
        answers = folder / ANSWERS
        asked = ["sample", "--model", model, "--data", str(heldout), *_of(recipe)]
        asked += ["--out", str(answers)]
        found.append(override(asked, only=OF_ANSWERS))
        if judge:
            found.append(score(answers, judge, SCORED, judged))
        if is_trained:
            word = f"log-ratio:{model}:{config.model}"
            found.append(score(answers, ["--reward", word], LOG_RATIOS, OF_MODEL))
    pairs = f"{folder}/pairs.jsonl"
    if config.gold is not None and any(pairs in words for words in commands):
        found.append(score(pairs, judge, JUDGED, judged))
    return found


def _of(recipe: Recipe) -> list[str]:
    """How the recipe samples from the current model, as far as answers differ by it."""
    lines = [x for x in recipe.rounds if x[0] == "sample" and "{policy}" in x]
    words = lines[-1] if lines else ()
    found: list[str] = []
    for n, word in enumerate(words):
        if word in OF_RECIPE:
            found += words[n : n + 1 + (word != "--raw")]
    return found
