"""Answers of all processes, each of which draws its share on its own devices."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
from tqdm import tqdm

from jaxpref.errors import InputError
from jaxpref.evaluate.unfinished import Unfinished
from jaxpref.runtime import processes
from jaxpref.sampling import Answer, Request, Rule, answer_all
from jaxpref.sampling.mixture import LanguageModel


def draw(
    model: LanguageModel,
    load: Callable[[], Any],
    rule: Rule,
    requests: Mapping[int, Request],
    *,
    batch_size: int,
    kept: Unfinished,
    largest: Request | None = None,
    title: str = "sampling",
) -> dict[int, Answer]:
    """The answer to each request, by its number.

    A process answers the requests for every so many prompts (`ids[0]`).

    Args:
      model: the model.
      load: gives its parameters.
      rule: how tokens are chosen.
      requests: by number; the same ones in every process.
      batch_size: see `answer_all`.
      kept: answers that are not drawn again; new ones are added.
      largest: see `answer_all`.
      title: of the progress bar.

    Raises:
      InputError: on every process, if one of them raises it.
    """
    index, count = jax.process_index(), jax.process_count()
    mine = {n: x for n, x in requests.items() if x.ids[0] % count == index}

    def drawn() -> dict[int, Answer]:
        digests = {n: _digest(request) for n, request in mine.items()}
        found = {
            n: Answer(**x["answer"])
            for n in mine
            if (x := kept.get(n)) and x.get("request") == digests[n]
        }
        rest = [n for n in mine if n not in found]
        asked = [mine[n] for n in rest]
        # `answer_all` makes its own copy of the parameters, and then needs no other.
        answers = iter(())
        if asked:
            answers = answer_all(
                model, load(), asked, rule, batch_size=batch_size, largest=largest
            )
        with tqdm(
            total=len(mine), initial=len(found), desc=title, disable=index > 0
        ) as bar:
            for place, answer in answers:
                found[n := rest[place]] = answer
                record = {"request": digests[n], "answer": answer._asdict()}
                kept.add(n, record)
                bar.update()
        return found

    return _of_all_processes(drawn)


def _digest(request: Request) -> str:
    """Of a request, which may depend on earlier answers and their rewards."""
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:16]


def _of_all_processes(drawn: Callable[[], dict[int, Answer]]) -> dict[int, Answer]:
    if jax.process_count() == 1:
        return drawn()
    try:
        mine = {n: answer._asdict() for n, answer in drawn().items()}
        text = json.dumps({"answers": mine})
    except InputError as error:
        text = json.dumps({"error": str(error)})
    answers: dict[int, Answer] = {}
    for found in map(json.loads, processes.gather_texts(text)):
        if "error" in found:
            raise InputError(found["error"])
        answers |= {int(n): Answer(**x) for n, x in found["answers"].items()}
    return answers
