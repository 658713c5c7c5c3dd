"""Plain texts without a prompt, all of whose tokens are trained on.

A text ends with EOS.  One that is longer than `max_length` becomes several pieces.  The
first token of a piece is given and not trained: BOS, if the tokenizer has one, or the
last token of the piece before it, or the first token of the text.  So every token that
something can predict is trained exactly once.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jaxpref.data.end_of_turn import Ends, end_text, ends_of, holds_an_end
from jaxpref.data.records import Example
from jaxpref.data.tokenize import INNER_END, NO_TOKENS
from jaxpref.data.tokens import Tokens


def is_document(example: Example) -> bool:
    """Whether an example is one text without a prompt."""
    return example.prompt == "" and len(example.completions) == 1


def with_documents(
    examples: Sequence[Example],
    places: Sequence[str],
    tokenize: Callable[[Sequence[Example], Sequence[str]], list[Tokens | str]],
    *,
    tokenizer: Any,
    max_length: int,
) -> list[Any]:
    """Tokenizes examples, some of which may be documents.

    Args:
      examples: the examples.
      places: "file row n" of each, for errors.
      tokenize: `(examples, places) -> tokens`, or the reason to drop an example.
      tokenizer: from `load_tokenizer`.
      max_length: maximum tokens of a piece.

    Returns:
      For each example its tokens, or the reason to drop it; for a document a list of
      the tokens of its pieces.
    """
    others = [n for n, example in enumerate(examples) if not is_document(example)]
    found: list[Any] = [None] * len(examples)
    if others:
        read = tokenize([examples[n] for n in others], [places[n] for n in others])
        for n, tokens in zip(others, read, strict=True):
            found[n] = tokens
    documents = [n for n, tokens in enumerate(found) if tokens is None]
    if documents:
        encoded = tokenizer(
            [examples[n].texts[0] for n in documents],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        ends = ends_of(tokenizer)
        for n, tokens in zip(documents, encoded, strict=True):
            found[n] = _pieces(tokens, examples[n], ends, max_length)
    return found


def _pieces(
    tokens: list[int], example: Example, ends: Ends, max_length: int
) -> list[Tokens] | str:
    """The pieces of one document, or the reason to drop it."""
    bos = ends.bos
    while bos is not None and tokens[:1] == [bos]:
        tokens = tokens[1:]
    if not tokens:
        return NO_TOKENS
    if all(example.ended):
        tokens = end_text(tokens, ends)
    if holds_an_end(tokens, ends):
        return INNER_END
    whole = tokens if bos is None else [bos, *tokens]
    starts = range(0, len(whole) - 1, max_length - 1)
    pieces = [whole[start : start + max_length] for start in starts]
    return [Tokens(x[:1], [x[1:]], False, 0) for x in pieces] or NO_TOKENS
