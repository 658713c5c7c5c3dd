"""Renders chat templates in a separate process, with limits on time and memory.

A chat template is a program that comes with a model.  Jinja's sandbox keeps it away
from files and Python's internals, but lets it compute or allocate without end:
`10 ** 10 ** 10` never returns, and no signal handler runs until it does.  So templates
run in a child process (`template_child`), which the operating system stops.
"""

import atexit
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpref.data.records import Message
from jaxpref.errors import InputError, first_line

MAX_SECONDS = 5
"""CPU time for rendering one conversation."""
MAX_BYTES = 512 * 2**20
"""Memory that a template may use."""
MAX_CHARACTERS = 10_000_000
"""Length of a rendered conversation."""

_CHILD = Path(__file__).with_name("template_child.py")
_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FEWER = "use a template that does less"


def render_template(
    messages: Sequence[Message],
    place: str,
    tokenizer: Any,
    open_answer: bool,
    **variables: Any,
) -> str:
    """The text of a conversation, as `tokenizer.apply_chat_template` returns it.

    Args:
      messages: the conversation.
      place: "file row n", for errors.
      tokenizer: whose chat template renders it.
      open_answer: whether the text ends with the opening of an answer.
      **variables: further arguments of `apply_chat_template`, such as `tools`.

    Raises:
      InputError: if there is no template, or it rejects the conversation, or exceeds a
        limit.
    """
    return _rendered(messages, place, tokenizer, open_answer, variables, _render)


def _rendered(
    messages: Sequence[Message],
    place: str,
    tokenizer: Any,
    open_answer: bool,
    variables: Mapping[str, Any],
    render: Callable[[Any, list[Any], Mapping[str, Any]], Any],
) -> str:
    if not tokenizer.chat_template:
        # Do not invent a template: the model has never seen it, and no server of the
        # exported model would use it.
        raise InputError(
            f"{place}: the record holds messages, but the tokenizer has no chat"
            " template; use a tokenizer that has one (chat_template.jinja in the model"
            " folder), or write prompt, chosen and rejected as strings"
        )
    options = {"add_generation_prompt": open_answer, **variables}
    try:
        text = render(tokenizer, list(messages), options)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise _rejected(place, first_line(error)) from None
    except RecursionError:
        raise _rejected(place, "the conversation is nested too deeply") from None
    if not isinstance(text, str):
        raise _rejected(place, f"it returns {type(text).__name__}, not a string")
    return text


def has_generation_blocks(tokenizer: Any) -> bool:
    """Whether the chat template says with `{% generation %}` what the model writes."""
    return bool(_BLOCK.search(str(tokenizer.chat_template or ""))) and _is_jinja(
        tokenizer
    )


def generation_blocks(
    messages: Sequence[Message], place: str, tokenizer: Any, **variables: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and its `{% generation %}` blocks in order.

    Args:
      messages: the conversation, with its last answer.
      place: "file row n", for errors.
      tokenizer: its chat template has such blocks; see `has_generation_blocks`.
      **variables: as for `render_template`.

    Returns:
      The text, and the start and end of each block in characters.

    Raises:
      InputError: as `render_template`.
    """
    blocks: list[tuple[int, int]] = []
    render = functools.partial(_render, blocks=blocks)
    text = _rendered(messages, place, tokenizer, False, variables, render)
    return text, blocks


def _render(
    tokenizer: Any,
    messages: list[Any],
    options: Mapping[str, Any],
    blocks: list[tuple[int, int]] | None = None,
) -> Any:
    """The text; its generation blocks are added to `blocks`, if it is given."""
    if not _is_jinja(tokenizer):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    template, special = tokenizer.chat_template, tokenizer.special_tokens_map
    text, found = _CHILDREN.render(
        template, special, messages, options, blocks is not None
    )
    if blocks is not None:
        blocks += [(start, end) for start, end in found]
    return text


def _is_jinja(tokenizer: Any) -> bool:
    """Whether the format is a template, and not a tokenizer's own Python code."""
    from transformers import PreTrainedTokenizerBase

    method = getattr(tokenizer.apply_chat_template, "__func__", None)
    return method is PreTrainedTokenizerBase.apply_chat_template


def _rejected(place: str, why: str) -> InputError:
    return InputError(f"{place}: the chat template rejects it ({why})")


class _Children:
    """The child process, started when first needed, and again after it was stopped."""

    def __init__(self):
        self._lock = threading.Lock()
        self._child: subprocess.Popen | None = None
        self._owner = 0
        self._loaded: Any = None

    def render(
        self,
        template: Any,
        special: Any,
        messages: list[Any],
        options: Any,
        blocks: bool,
    ) -> tuple[str, list]:
        """One conversation and its generation blocks, if asked for.

        Raises an InputError without a place.
        """
        request = {"messages": messages, "options": options, "blocks": blocks}
        with self._lock:
            child = self._started()
            loaded = [template, special]
            if loaded != self._loaded:  # most requests have the same template
                request["loaded"] = self._loaded = loaded
            line = json.dumps(request)
            try:
                child.stdin.write(line + "\n")
                child.stdin.flush()
                reply = child.stdout.readline()
            except OSError:
                reply = ""
            if not reply.endswith("\n"):
                raise InputError(self._ended())
        kind, text, *found = json.loads(reply)
        if kind == "text":
            return text, *found
        if kind == "rejected":
            raise ValueError(text)
        raise InputError(f"the chat template {text}; {_FEWER}")

    def close(self) -> None:
        """Ends the child if this process started one."""
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            child.communicate()

    def _started(self) -> Any:
        if self._child is None or self._owner != os.getpid():
            limits = (MAX_SECONDS, MAX_BYTES, MAX_CHARACTERS)
            self._child = subprocess.Popen(
                # -P: nothing is imported from the working directory.
                [sys.executable, "-P", str(_CHILD), *map(str, limits)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="ascii",
                env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"},
            )
            self._owner, self._loaded = os.getpid(), None
        return self._child

    def _ended(self) -> str:
        """Why the child ended."""
        child, self._child = self._child, None
        assert child is not None
        child.kill()  # does nothing to a child that has ended
        child.communicate()
        code = child.returncode
        if code == -signal.SIGPROF:
            return f"the chat template takes more than {MAX_SECONDS} s; {_FEWER}"
        how = signal.Signals(-code).name if code < 0 else f"code {code}"
        return f"the chat template cannot be rendered: its process ended by {how}"


_CHILDREN = _Children()
atexit.register(_CHILDREN.close)
