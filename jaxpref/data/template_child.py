"""The process that renders chat templates; see `template`.

Reads one JSON request from each line of stdin and writes one JSON reply for it:
["text", TEXT], ["rejected", WHY], or ["limit", WHAT].  Ends with its parent.
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
        render = functools.partial(
            PreTrainedTokenizerBase.apply_chat_template, tokenizer, tokenize=False
        )
        signal.setitimer(signal.ITIMER_PROF, seconds)
        reply = answer(render, request, memory, characters)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


def answer(render: Any, request: Any, memory: int, characters: int) -> str:
    """The reply to a request, as one line of JSON."""
    too_much = f"needs more than {memory / 2**20:,.0f} MiB"
    try:
        text = render(request["messages"], **request["options"])
        if len(text) > characters:
            wrote = f"writes {len(text):,} characters; the limit is {characters:,}"
            return json.dumps(["limit", wrote])
        return json.dumps(["text", text])
    except MemoryError:
        return json.dumps(["limit", too_much])
    except RecursionError:
        return json.dumps(["limit", "calls itself without end"])
    except Exception as error:  # whatever a template makes Python raise
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return json.dumps(["rejected", why])


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
