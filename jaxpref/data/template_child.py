"""The process that renders chat templates; see `template`.

Reads one JSON request from each line of stdin and writes one JSON reply for it:
["text", TEXT, BLOCKS], ["rejected", WHY], or ["limit", WHAT].  BLOCKS are the start and
end of each `{% generation %}` block in the text, if a request asks for them.  Ends with
its parent.
"""

import functools
import json
import resource
import signal
import sys
from types import SimpleNamespace
from typing import Any


def main() -> None:
    """Answers requests until stdin is closed."""
    from transformers import PreTrainedTokenizerBase

    seconds, memory, characters = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, even within C
    limit_memory(memory)
    tokenizer: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        if "loaded" in request:
            template, special = request["loaded"]
            # All that `apply_chat_template` reads of a tokenizer when it only renders.
            tokenizer = SimpleNamespace(
                chat_template=template, special_tokens_map=special
            )
            tokenizer.get_chat_template = functools.partial(
                PreTrainedTokenizerBase.get_chat_template, tokenizer
            )
            tokenizer.render = functools.partial(
                PreTrainedTokenizerBase.apply_chat_template, tokenizer, tokenize=False
            )
        signal.setitimer(signal.ITIMER_PROF, seconds)
        reply = answer(tokenizer, request, memory, characters)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


def answer(tokenizer: Any, request: Any, memory: int, characters: int) -> str:
    """The reply to a request, as one line of JSON."""
    wanted = request.pop("blocks", False)
    too_much = f"needs more than {memory / 2**20:,.0f} MiB"
    try:
        text = tokenizer.render(request["messages"], **request["options"])
        if len(text) > characters:
            wrote = f"writes {len(text):,} characters; the limit is {characters:,}"
            return json.dumps(["limit", wrote])
        blocks = generation_blocks(tokenizer, text, **request) if wanted else []
        return json.dumps(["text", text, blocks])
    except MemoryError:
        return json.dumps(["limit", too_much])
    except RecursionError:
        return json.dumps(["limit", "calls itself without end"])
    except Exception as error:  # whatever a template makes Python raise
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return json.dumps(["rejected", why])


def generation_blocks(
    tokenizer: Any, text: str, *, messages: Any, options: Any, loaded: Any = None
) -> list[tuple[int, int]]:
    """Where the `{% generation %}` blocks of a rendered conversation are.

    `apply_chat_template` returns them as a mask of tokens, and there are none here.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    tools = options.get("tools")
    found: Any = render_jinja_template(  # annotated as text
        conversations=[
            [{k: v for k, v in x.items() if v is not None} for x in messages]
        ],
        chat_template=tokenizer.get_chat_template(None, tools),
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **options},
    )
    (rendered,), (blocks,) = found
    if rendered != text:
        raise ValueError("it renders differently when asked for its generation blocks")
    return blocks


def limit_memory(memory: int) -> None:
    """Lets the process allocate `memory` more bytes; more is a MemoryError."""
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux: time is limited anyway
        return
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))


if __name__ == "__main__":
    main()
