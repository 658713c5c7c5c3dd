"""Recipes: the commands of each round, with places for what differs between rounds."""

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxpref.errors import InputError, closest

FOLDER = Path(__file__).parent / "recipes"
PLACE = re.compile(r"\{(\w+)\}")
PLACES = {
    "model": "the model before training, --model",
    "policy": "the model that the last round has trained; at first, --model",
    "weak": "a weaker model, --weak-model",
    "data": "labeled pairs, --data",
    "prompts": "the prompts of this round",
    "heldout": "the prompts that no round trains on",
    "pairs": "this round's pairs.jsonl; with --mix-offline, also --data",
    "reward": "--reward and the other options of rewards",
    "round": "the folder of this round",
    "n": "the number of this round",
    "seed": "a seed that differs between rounds and follows --seed",
}
"""What a recipe may leave open."""
OF_ROUND = {"prompts", "pairs"}
"""Those that there are not before the first round."""
COMMANDS = ("sample", "score", "data", "train", "evaluate", "compare")
"""The commands that a recipe may run."""
POLICY = "{round}/policy"
"""Where the training of a round writes."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The commands before the first round and of each round, as words."""

    name: str
    about: str
    """What it does, with its source."""
    start: tuple[tuple[str, ...], ...]
    rounds: tuple[tuple[str, ...], ...]
    measures: tuple[tuple[str, ...], ...] = ()
    """What is run after `start` and after each round."""

    @property
    def places(self) -> frozenset[str]:
        """The places that it has."""
        lines = *self.start, *self.rounds, *self.measures
        words = (word for line in lines for word in line)
        return frozenset(place for word in words for place in PLACE.findall(word))

    @property
    def starts_with_training(self) -> bool:
        """Whether a model is trained before the first round."""
        return any(map(trains, self.start))

    def has_trained_before(self, n: int) -> bool:
        """Whether a model is trained before round n."""
        return n > 1 or (n == 1 and self.starts_with_training)


def shipped() -> dict[str, Path]:
    """The recipes of the package by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.recipe"))}


def read_recipe(name: str) -> Recipe:
    """A recipe of the package, or one in a file.

    A file has a line for each command, without the word `jaxpref`; a line that ends
    with a backslash continues.  The commands after `start:` run once, those after
    `round:` in every round, and those after `measure:` before the first round and after
    each one.  Lines that begin with # are comments, and those at the top say what the
    recipe does.

    Args:
      name: of the recipe, or the path of a file.

    Raises:
      InputError: if there is no such recipe, or a line is not a command.
    """
    known = shipped()
    path = known.get(name, Path(name))
    if not path.is_file():
        raise InputError(
            f"--recipe {name}: no such recipe or file{closest(name, known)}; choose "
            f"from {', '.join(known)}, or write a file (docs/rounds.md)"
        )
    return parse_recipe(path.read_text("utf-8"), name)


def parse_recipe(text: str, name: str) -> Recipe:
    """The recipe in a text; see `read_recipe`."""
    about: list[str] = []
    parts: dict[str, list[tuple[str, ...]]] = {"start": [], "round": [], "measure": []}
    part = None
    for number, line in _lines(text):
        where = f"--recipe {name}: line {number}"
        if line.startswith("#"):
            if part is None:
                about.append(line.lstrip("# "))
        elif line.removesuffix(":") in parts and line.endswith(":"):
            part = line.removesuffix(":")
        elif line and part is None:
            raise InputError(f"{where}: begin with 'start:' or 'round:'")
        elif line and part is not None:
            parts[part].append(_words(line, where))
            if part == "measure" and (of_round := OF_ROUND & {*PLACE.findall(line)}):
                raise InputError(
                    f"{where}: {{{min(of_round)}}}: measurements also run before the "
                    "first round, which has none; use {heldout}, or measure in 'round:'"
                )
    if not parts["round"]:
        raise InputError(f"--recipe {name}: has no commands after 'round:'")
    found = Recipe(Path(name).stem, " ".join(about), *map(tuple, parts.values()))
    if not any(map(trains, found.rounds)):
        raise InputError(
            f"--recipe {name}: no command of a round is `train ... --out {POLICY}`, "
            "which the next round continues from"
        )
    return found


def trains(line: Sequence[str]) -> bool:
    """Whether a command trains the model with which the next round continues."""
    return line[0] == "train" and POLICY in line


def filled(words: Sequence[str], places: Mapping[str, Sequence[str]]) -> list[str]:
    """The words of a command with every place filled in.

    Args:
      words: of a recipe.
      places: the words for each place.  A place within a word needs a single one.
    """
    found: list[str] = []
    for word in words:
        whole = PLACE.fullmatch(word)
        if whole:
            found.extend(places[whole[1]])
        else:
            found.append(PLACE.sub(lambda x: _single(places[x[1]]), word))
    return found


def _single(words: Sequence[str]) -> str:
    if len(words) != 1:
        raise InputError(
            f"--recipe: {' '.join(words)!r} is several words, which cannot be a part "
            "of another; leave a space around the place"
        )
    return words[0]


def _lines(text: str) -> list[tuple[int, str]]:
    """The lines with their numbers; continued ones are joined."""
    found: list[tuple[int, str]] = []
    before, number = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        whole = f"{before} {line.strip()}".strip()
        if whole.endswith("\\") and not whole.startswith("#"):
            before = whole.removesuffix("\\").strip()
        else:
            before = ""
            found.append((number, whole))
    if before:
        raise InputError(
            f"--recipe: line {number}, the last one, ends with a backslash; remove it"
        )
    return found


def _words(line: str, where: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(line))
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    if words[0] not in COMMANDS:
        raise InputError(
            f"{where}: {words[0]}: is no command of a recipe"
            f"{closest(words[0], COMMANDS)}; choose from {', '.join(COMMANDS)}"
        )
    for place in (place for word in words for place in PLACE.findall(word)):
        if place not in PLACES:
            raise InputError(
                f"{where}: {{{place}}}: nothing has this name{closest(place, PLACES)}; "
                f"choose from {', '.join(PLACES)}"
            )
    if "--out" not in words or not words[-1]:
        raise InputError(f"{where}: has no --out; write into {{round}}")
    out = words[words.index("--out") + 1 :][:1]
    if not out or not out[0].startswith("{round}/"):
        raise InputError(f"{where}: --out must be in the round's folder, {{round}}/...")
    return words
