"""Answers that are objects with a `text` and what a sampler says of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpref.errors import InputError


def texts_of_answers(given: Sequence[Any], place: str) -> list[Any]:
    """The answers of a list: texts, messages, or the `text` of each object.

    Args:
      given: the list in the file.
      place: file, row and field, for errors.

    Raises:
      InputError: if only some are objects, or one has no text.
    """
    objects = [is_object(x) for x in given]
    if any(objects) and not all(objects):
        raise InputError(f"{place} must hold texts, or objects with a 'text' each")
    for n, one in enumerate(given):
        if is_object(one) and not isinstance(one.get("text"), str):
            raise InputError(f"{place}: object {n + 1} has no 'text'; add it")
    texts = [x["text"] if is_object(x) else x for x in given]
    for n, one in enumerate(texts):
        if not isinstance(one, str | list | Mapping):
            raise InputError(
                f"{place}: answer {n + 1} must be a text or messages, but it is "
                f"{one!r:.50}"
            )
    return texts


def ended_of_answers(given: Sequence[Any]) -> list[bool] | None:
    """Whether each answer is complete; None if one of them does not say it.

    `ended` says it, or vLLM's `finish_reason`.
    """
    found = []
    for one in given:
        about = one if is_object(one) else {}
        if isinstance(ended := about.get("ended"), bool):
            found.append(ended)
        elif isinstance(reason := about.get("finish_reason"), str):
            found.append(reason == "stop")
        else:
            return None
    return found or None


def is_object(answer: Any) -> bool:
    """Whether an answer is an object, and not a text or messages."""
    return isinstance(answer, Mapping) and "role" not in answer
