"""The page of `jaxpref data inspect`: counts, lengths, and pairs as tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpref.report.html import Browse, Section, SideBySide, Table, write_html

SPECIAL = ("⟦", "⟧")
"""Put around special tokens, which would otherwise look like other text."""
GIVEN = ("⟪", "⟫")
"""Put around what stands in an answer and is not trained on."""


def write_inspection(
    path: str,
    counts: Mapping[str, Any],
    lengths: Mapping[str, Mapping[str, float]],
    annotators: Mapping[str, int],
    examples: Sequence[tuple[str, Sequence[str]]],
    *,
    fields: str,
    data: str,
    model: str,
) -> None:
    """Writes the page.

    Args:
      path: where to write.
      counts: what was read, dropped, and found, by name.
      lengths: tokens of each part, by statistic.
      annotators: pairs of each annotator.
      examples: for each pair, its place and the texts of its prompt and completions.
      fields: which fields of the records were read.
      data: name of the data.
      model: name of the model whose tokenizer and template were used.

    Raises:
      InputError: if the page cannot be written.
    """
    statistics = list(next(iter(lengths.values()), {}))
    rows = [
        [name, *(f"{x[s]:,.0f}" for s in statistics)] for name, x in lengths.items()
    ]
    parts = [
        Section(
            "Records",
            [Table(["", "count"], list(counts.items())), fields],
        ),
        Section("Lengths", [Table(["tokens", *statistics], rows)]),
    ]
    if annotators:
        table = Table(["annotator", "pairs"], list(annotators.items()))
        parts.append(Section("Annotators", [Browse(table, list(annotators))]))
    shown = [
        SideBySide(
            [*zip(answer_names(len(texts) - 1), texts[1:], strict=True)],
            title=place,
            above=texts[0],
        )
        for place, texts in examples
    ]
    intro = (
        f"Exactly the tokens that are trained on, decoded; special tokens are in"
        f" {SPECIAL[0]} {SPECIAL[1]}. The loss covers the answers, including their"
        " last token, but not the prompt above them, and not what is in"
        f" {GIVEN[0]} {GIVEN[1]}: the turns of others in answers of several turns."
    )
    places = [place for place, _ in examples]
    parts.append(Section("What the model sees", [intro, Browse(shown, places)]))
    title = f"{data}, as {model} sees it"
    write_html(path, title, parts)


def answer_names(count: int) -> list[str]:
    """What the answers of a record are called."""
    if count <= 2:
        return ["chosen", "rejected"] if count == 2 else ["answer"]
    return [f"answer {n}" for n in range(1, count + 1)]
