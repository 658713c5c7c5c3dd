"""`jaxpref data inspect`, `convert`, `pairs`, `select`, `hindsight` and others."""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxpref import data
from jaxpref.cli import help
from jaxpref.cli.data_pairs import PairsConfig, make_pairs
from jaxpref.cli.options import Option, Part, options_of, parse
from jaxpref.cli.words import closest, split
from jaxpref.data.columns import HELPSTEER2, names_of
from jaxpref.data.convert import convert
from jaxpref.data.hindsight import all_hindsight_records
from jaxpref.data.inspection import Inspection, Segment, inspect_pairs, segments
from jaxpref.data.instructed import INSTRUCTIONS, all_instructed_records
from jaxpref.data.kinds import KINDS
from jaxpref.data.steerlm import all_steered_records
from jaxpref.errors import InputError, paint, show
from jaxpref.files import check_output, write_whole
from jaxpref.models.folder_config import is_reward_model, read_architecture
from jaxpref.models.hub import resolve_folder
from jaxpref.report.inspection import (
    GIVEN,
    SPECIAL,
    answer_names,
    write_inspection,
)
from jaxpref.runtime.ranges import at_least
from jaxpref.select.config import SelectConfig
from jaxpref.select.run import run as run_selection

COLORS = {
    "prompt": "blue",
    "given": "blue",
    "answer": "green",
    "special": "magenta",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Options of `jaxpref data inspect`, besides those of the data."""

    data: str
    """The data, as for `jaxpref train`."""
    model: str
    """Hugging Face model folder or Hub ID, whose tokenizer and chat template are
    used."""
    kind: Literal["pairs", "answers", "labeled", "lists"] | None = None
    """What is read of each record: a pair; one answer, as for `--loss sft`; an answer
    with a label, as for `--loss kto`; or a list, as for `--loss plackett_luce`
    (default: what the first record is, but never answers)."""
    out: str | None = None
    """HTML page to write.  By default, nothing is written."""
    show: int = 3
    """Number of records to show as the model sees them."""

    def __post_init__(self):
        at_least(0, self, "show")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Options of `jaxpref data convert`."""

    data: str
    """The data, as for `jaxpref train`."""
    out: str
    """File to write: .jsonl, .parquet or .array_record."""
    seed: int | None = None
    """Shuffle the records with this seed.  By default, their order is kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HindsightConfig(data.RecordOptions):
    """Options of `jaxpref data hindsight`."""

    data: str
    """Preference pairs, as for `jaxpref train`."""
    out: str
    """JSONL file to write."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteerConfig(data.RecordOptions):
    """Options of `jaxpref data steer`."""

    data: str
    """Single answers with ratings by attribute."""
    out: str
    """JSONL file to write."""
    attributes: tuple[str, ...] = HELPSTEER2
    """Fields with ratings, in the order in which they are written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructConfig(data.RecordOptions):
    """Options of `jaxpref data instruct`."""

    data: str
    """Preference pairs, as for `jaxpref train`."""
    out: str
    """JSONL file to write."""
    instructions: int = 3
    """Instructions that are added to a prompt, each of another kind; at most 6."""
    seed: int = 0
    """Seed of their choice."""

    def __post_init__(self):
        super().__post_init__()
        at_least(1, self, "instructions")
        if self.instructions > len(INSTRUCTIONS):
            raise InputError(
                f"--instructions {self.instructions}: there are {len(INSTRUCTIONS)} "
                "kinds of instructions; pass at most this number"
            )
        at_least(0, self, "seed")


ABOUT = {
    "inspect": "Show what a model will see of preference data: lengths, what is"
    " truncated\nand dropped, duplicates, contradictions, annotators, and tokens.",
    "convert": "Write data from any source as one file.",
    "pairs": "Make preference pairs from answers with scores, or from the answers"
    "\nof a stronger and a weaker model.",
    "select": "Choose records by a column, by the agreement of annotators, without"
    "\nduplicates, or by what a model says of them.",
    "hindsight": "Write pairs as records for --loss sft that train both answers, each"
    "\nafter words that say whether it is good (chain of hindsight).",
    "steer": "Write rated answers as records for --loss sft, with their ratings in the"
    "\nprompt (SteerLM).",
    "instruct": "Write pairs of prompts for each answer: one with instructions that it"
    "\nfollows, which is preferred, and one with instructions that it does not (MAPL).",
}
PARTS = {
    "inspect": {"config": Part(InspectConfig), "options": Part(data.DataOptions)},
    "convert": {"config": Part(ConvertConfig)},
    "pairs": {"config": Part(PairsConfig)},
    "select": {"config": Part(SelectConfig)},
    "hindsight": {"config": Part(HindsightConfig)},
    "steer": {"config": Part(SteerConfig)},
    "instruct": {"config": Part(InstructConfig)},
}


def command(argv: Sequence[str]) -> None:
    """Runs the action that the first word names."""
    name, rest = _action(argv)
    if rest and not rest[0].startswith("--"):  # the data may come first
        rest = ["--data", *rest]
    ACTIONS[name](parse(PARTS[name], split(rest), command=f"jaxpref data {name}"))


def options() -> dict[str, Option]:
    """The options of all actions."""
    return {
        name: option
        for parts in PARTS.values()
        for name, option in options_of(parts).items()
    }


def help_text(argv: Sequence[str]) -> str:
    """The help of an action, or of all."""
    named = [word for word in argv if word in PARTS]
    texts = [
        f"{ABOUT[name]}\n\n"
        + help.command(f"jaxpref data {name}", options_of(PARTS[name]))
        for name in named or PARTS
    ]
    return "\n\n".join(texts)


def _action(argv: Sequence[str]) -> tuple[str, list[str]]:
    name, rest = (list(argv) + [""])[0], list(argv[1:])
    if name not in PARTS:
        raise InputError(
            f"jaxpref data {name}: expected {', '.join(PARTS)}{closest(name, PARTS)}"
        )
    return name, rest


def _inspect(parsed: Any) -> None:
    config: InspectConfig = parsed.config
    if config.out is not None:
        reads = {"--data": config.data, "--model": config.model}
        check_output("--out", config.out, reads)
    folder = resolve_folder(config.model)
    tokenizer = data.load_tokenizer(folder, parsed.options.template_options)
    length = read_architecture(folder).context_length
    options = data.for_model(parsed.options, length)
    # Everything is inspected, whatever a run would hold out.
    options = dataclasses.replace(options, heldout_fraction=0.0)
    kind = KINDS[config.kind] if config.kind else data.first_kind(config.data, options)
    source = data.open_records(config.data, options, sides=kind.sides)
    splits = data.make_splits(
        source,
        tokenizer,
        options,
        kind=kind,
        whole_turns=is_reward_model(folder),
    )
    pairs = splits.train
    found = inspect_pairs(pairs)
    counts = _counts(splits.report, found)
    fields = splits.fields.describe()
    shown = range(min(config.show, len(pairs)))
    examples = [
        (source.location(int(pairs.columns["row"][n])), segments(pairs, n, tokenizer))
        for n in shown
    ]
    show(f"{config.data}: {fields}")
    for line in splits.fields.warnings():
        show(f"{config.data}: {line}")
    show("")
    show(help.table({name: str(value) for name, value in counts.items()}, column=40))
    show("\n" + _lengths(found))
    for place, parts in examples:
        _show_example(place, parts)
    if config.out is not None:
        write_inspection(
            config.out,
            counts,
            found.lengths,
            found.annotators,
            [(place, [_marked(part) for part in parts]) for place, parts in examples],
            fields=fields,
            data=Path(config.data).name,
            model=Path(config.model).name,
        )
        show(f"\n{config.out}")


def _counts(report: dict[str, int], found: Inspection) -> dict[str, Any]:
    """What was read, left out and found, by name, without zeros."""
    read = {k: v for k, v in report.items() if k not in ("train", "heldout", "flipped")}
    counts = read | {
        "pairs": found.pairs,
        "different prompts": found.prompts,
        "duplicates of an earlier pair": found.copies,
        "pairs that contradict another": found.contradictions,
        "labels marked as wrong": found.flipped,
        "annotators": len(found.annotators),
        "tokens of an epoch": found.tokens,
    }
    shares = {"padding without packing": found.padded}
    if found.longer_chosen is not None:
        shares["chosen answer is longer"] = found.longer_chosen
    shown = {name: f"{value:,}" for name, value in counts.items() if value}
    return shown | {name: f"{value:.0%}" for name, value in shares.items()}


def _lengths(found: Inspection) -> str:
    """The lengths as a table."""
    names = list(next(iter(found.lengths.values())))
    line = lambda first, cells: f"  {first:28}" + "".join(f"{x:>9}" for x in cells)
    rows = [
        line(part, [f"{values[name]:,.0f}" for name in names])
        for part, values in found.lengths.items()
    ]
    return "\n".join([line("tokens", names), *rows])


def _show_example(place: str, parts: list[list[Segment]]) -> None:
    names = ["prompt", *answer_names(len(parts) - 1)]
    show(f"\n{place}")
    for name, part in zip(names, parts, strict=True):
        show(f"--- {name}, {sum(x.tokens for x in part)} tokens")
        if sys.stdout.isatty():
            paint([(x.text, COLORS[x.kind]) for x in part])
        else:
            show(_marked(part))


def _marked(part: list[Segment]) -> str:
    """Segments as text, with marks around special tokens and what is not trained."""
    marks = {"special": SPECIAL, "given": GIVEN}
    return "".join(x.text.join(marks.get(x.kind, ("", ""))) for x in part)


def _convert(parsed: Any) -> None:
    config: ConvertConfig = parsed.config
    check_output("--out", config.out, {"--data": config.data})
    source = data.open_source(config.data)
    count = convert(source, Path(config.out), seed=config.seed)
    show(f"{config.out}: {count:,} records")


def _select(parsed: Any) -> None:
    config: SelectConfig = parsed.config
    found = run_selection(config)
    show(f"{config.out}: {found.kept:,} of {found.records:,} records")
    counts = {name: f"{count:,}" for name, count in found.reasons.items()}
    if counts:
        show("left out:")
        show(help.table(counts, column=50))
    if found.scores:
        numbers = {k.replace("_", ", "): f"{x:.6g}" for k, x in found.scores.items()}
        show("scores:")
        show(help.table(numbers, column=50))
    show(config.scores_file)


def _hindsight(parsed: Any) -> None:
    config: HindsightConfig = parsed.config
    check_output("--out", config.out, {"--data": config.data})
    source = data.open_records(config.data, config, sides=2)
    records, dropped = all_hindsight_records(source, config)
    if not records:
        raise InputError(f"{config.data}: no pair is left of {len(source):,} records")
    _write(config.out, records, f"{len(source):,} pairs", dropped)


def _steer(parsed: Any) -> None:
    config: SteerConfig = parsed.config
    names = names_of(config.attributes)
    check_output("--out", config.out, {"--data": config.data})
    source = data.open_records(config.data, config, sides=1)
    records, dropped = all_steered_records(source, config, attributes=names)
    if not records:
        raise InputError(
            f"{config.data}: no answer with a rating of {', '.join(names)} is left of "
            f"{len(source):,} records; name the fields with --attributes"
        )
    _write(config.out, records, f"{len(source):,} answers", dropped)


def _instruct(parsed: Any) -> None:
    config: InstructConfig = parsed.config
    check_output("--out", config.out, {"--data": config.data})
    source = data.open_records(config.data, config, sides=2)
    records, dropped = all_instructed_records(
        source, config, count=config.instructions, seed=config.seed
    )
    if not records:
        raise InputError(f"{config.data}: no pair is left of {len(source):,} records")
    _write(config.out, records, f"{len(source):,} pairs", dropped)


def _write(out: str, records: list[dict], of: str, dropped: int) -> None:
    """Writes records that were made from others, and says how many there are."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_whole(out, "".join(lines))
    left = f"; {dropped:,} dropped" if dropped else ""
    show(f"{out}: {len(records):,} records of {of}{left}")


ACTIONS: dict[str, Callable[[Any], None]] = {
    "inspect": _inspect,
    "convert": _convert,
    "pairs": make_pairs,
    "select": _select,
    "hindsight": _hindsight,
    "steer": _steer,
    "instruct": _instruct,
}
