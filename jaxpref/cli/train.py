"""`jaxpref train`."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxpref.cli import config_file, help
from jaxpref.cli.objectives import (
    CORRECTIONS,
    MIXTURES,
    SAMPLED,
    WRAPPERS,
    Choice,
    choose,
    description,
    losses_by_kind,
    summary,
)
from jaxpref.cli.options import Option, Part, Parts, options_of, parse
from jaxpref.cli.words import Given, canonical, split
from jaxpref.data.mixing import read_mixture, short_names
from jaxpref.data.options import DataOptions, MixOptions
from jaxpref.data.record_options import RecordOptions
from jaxpref.errors import InputError, show
from jaxpref.models.lora import LoraOptions
from jaxpref.models.reward_head import HeadOptions
from jaxpref.models.soft_prompt import SoftPromptOptions
from jaxpref.online.options import (
    OF_EVALUATIONS,
    OF_REWARDS,
    UNREAD,
    PairOptions,
    PromptNumbers,
    SamplingOptions,
    UncertainReward,
)
from jaxpref.rewards.options import RewardOptions
from jaxpref.runtime.mesh import MeshConfig
from jaxpref.scoring.frozen_models import Teachers
from jaxpref.scoring.moving_reference import MovingAverage
from jaxpref.train.config import TrainConfig
from jaxpref.train.optimizer import OptimizerConfig
from jaxpref.train.options import RunOptions, steps_of

COMMAND = "jaxpref train"
COMMON = (
    *("model", "data", "out", "reference", "eval-data", "heldout-fraction"),
    *("max-steps", "epochs", "batch-size", "accumulation", "row-length"),
    *("lora.rank", "lora.alpha"),
    *("max-length", "learning-rate", "warmup-steps", "optimizer", "compute-dtype"),
    *("remat", "eval-every", "save-every", "keep-best", "seed", "mesh.fsdp"),
    *("config", "print-config"),
)
"""Options that `--help` lists; `--help-all` lists all options."""


PROMPTS = Option(
    "prompts",
    str,
    None,
    "File or dataset of the prompts to answer, for objectives of sampled answers, "
    "instead of --data.",
)
FILES = (
    Option(
        "config",
        str,
        None,
        "Read options from a YAML file; the command line overrides it.",
    ),
    Option("print-config", bool, False, "Print all options as a YAML file, and exit."),
)
"""Options for config files."""


def command(argv: Sequence[str], *, began: float | None = None) -> None:
    """Trains and exports a model.

    Args:
      argv: the options.
      began: the `time.time()` from which the time is counted (default: the start of
        this process).
    """
    given = split(argv, repeatable=("data", "logger", "reward"))
    printed = given.pop("print-config", None)
    if printed is not None:
        show(config_text(given).removesuffix("\n"))
        return
    choice, parsed = _parsed(given)
    config = _config(choice, parsed)
    import jax

    from jaxpref.online.run import run as run_online
    from jaxpref.train.run import run

    if choice.sampled:
        # Of pairs, no reward is read.
        more = () if choice.reads_pairs else (parsed.uncertain,)
        export = run_online(config, parsed.sampling, parsed.rewards, *more)
    else:
        export = run(config)
    if jax.process_index() == 0:
        line = shlex.join(["jaxpref", "train", *argv])
        out, best = Path(config.out), config.keep_best
        show("\n".join(_report(out, export, line, best, began)))


def _report(
    out: Path, export: Path, line: str, best: str | None, began: float | None
) -> list[str]:
    """Writes the report of a finished run, and returns lines that summarize it."""
    from jaxpref.report.progress import best_criterion, summary_lines
    from jaxpref.report.training import read_records, write_training
    from jaxpref.runtime.timings import process_start

    write_training(out, command=line)
    names = f"{export.name}*", "adapter*"
    exports = [str(path) for name in names for path in sorted(out.glob(name))]
    records = read_records(out / "metrics.jsonl")
    return summary_lines(
        records,
        seconds=time.time() - (process_start() if began is None else began),
        out=str(out),
        exports=exports,
        best=best_criterion(best, records),
    )


def config_of(given: Given) -> TrainConfig:
    """The config of a command line.

    Raises:
      InputError: if an option is invalid, or answers are to be sampled in training.
    """
    choice, parsed = _parsed(given)
    choice.refuse_sampled()
    return _config(choice, parsed)


def config_text(given: Given) -> str:
    """The complete config as YAML, for `--config` to read.

    Raises:
      InputError: if an option is invalid.
    """
    choice, parsed = _parsed(given)
    _config(choice, parsed)  # checks that the parts fit together
    parts = parts_of(choice)
    values = choice.words | config_file.values_of(parts, parsed)
    if values["epochs"] is None:
        values["max-steps"] = steps_of(parsed.run, 0)
    return config_file.write(options_of(parts), values)


def _parsed(given: Given) -> tuple[Choice, Any]:
    """The choice of loss and objective, and the parsed options of each part."""
    given, about = with_file(given)
    choice, given = choose(given)
    given = _with_prompts(choice, given)
    return choice, parse(
        parts_of(choice),
        given,
        command=COMMAND,
        about=about + choice.about,
        also=(PROMPTS.name, *(option.name for option in FILES)),
    )


def _with_prompts(choice: Choice, given: Given) -> Given:
    """The options with `--prompts FILE` as `--data FILE`, which means the same.

    Raises:
      InputError: if no prompts are read, or both are given, or none.
    """
    named = f"--prompts {' '.join(given.get('prompts', ()))}"
    if _names_data(choice):
        if "prompts" not in given:
            return given
        what = choice.sampled or "this run"
        raise InputError(
            f"{named}: {what} reads records with answers; give them with --data"
        )
    if "prompts" not in given and "data" not in given:
        raise InputError(
            f"{COMMAND}{choice.about}: needs --prompts FILE, the prompts to answer"
        )
    if "prompts" not in given:
        return given
    if "data" in given:
        raise InputError(
            f"{named} --data {' '.join(given['data'])}: both name the prompts to "
            "answer; give only one of them"
        )
    return {"data" if name == "prompts" else name: x for name, x in given.items()}


def with_file(given: Given) -> tuple[Given, str]:
    """The options with those of `--config FILE`, and the file, for messages."""
    if "config" not in given:
        return given, ""
    given = dict(given)
    path = " ".join(given.pop("config")) or "FILE"
    file = config_file.read(path)
    return config_file.overridden(file, given), f" --config {path}"


def _config(choice: Choice, parsed: Any) -> TrainConfig:
    if choice.sampled:
        return TrainConfig(
            **vars(parsed.run),
            objective=choice.objective(parsed),
            options=DataOptions(
                **parsed.records.for_other(),
                **vars(parsed.numbers),
                heldout_fraction=0.0,
            ),
            lora=parsed.lora,
            optimizer=parsed.optimizer,
            mesh=parsed.mesh,
        )
    files = read_mixture(parsed.run.data).names
    return TrainConfig(
        **vars(parsed.run),
        objective=choice.objective(parsed, sources=short_names(files)),
        options=parsed.options,
        head=parsed.head,
        lora=parsed.lora,
        soft_prompt=parsed.soft_prompt,
        moving_average=parsed.moving_average,
        teachers=parsed.teachers,
        mix=parsed.mix if choice.mixture else None,
        optimizer=parsed.optimizer,
        mesh=parsed.mesh,
    )


def parts_of(choice: Choice) -> Parts:
    """The options that the command reads, except `--loss` and others in `choose`."""
    if choice.sampled:
        of_pairs = choice.reads_pairs
        return {
            "run": Part(RunOptions),
            "sampling": Part(SamplingOptions),
            "rewards": Part(RewardOptions),
            **({} if of_pairs else {"uncertain": Part(UncertainReward)}),
            "records": Part(RecordOptions),
            "numbers": Part(PairOptions if of_pairs else PromptNumbers),
            "lora": Part(LoraOptions, "lora"),
            "optimizer": Part(OptimizerConfig),
            "mesh": Part(MeshConfig, "mesh"),
        } | dict(choice.parts)
    parts = {
        "run": Part(RunOptions),
        "options": Part(DataOptions),
        "head": Part(HeadOptions, "head"),
        "lora": Part(LoraOptions, "lora"),
        "soft_prompt": Part(SoftPromptOptions, "soft-prompt"),
        "moving_average": Part(MovingAverage, "moving-average"),
        "teachers": Part(Teachers),
        "optimizer": Part(OptimizerConfig),
        "mesh": Part(MeshConfig, "mesh"),
    }
    if choice.mixture:
        parts["mix"] = Part(MixOptions)
    return parts | dict(choice.parts)


def options() -> dict[str, Option]:
    """All options that do not depend on `--loss` or `--objective`."""
    found = {o.name: o for o in (PROMPTS, *FILES)}
    return found | options_of(parts_of(Choice()))


def help_text(argv: Sequence[str]) -> str:
    """The help for `--help` and `--help-all`, or for a named loss or objective."""
    flags = ("-h", "--help", "--help-all")
    choice, given = choose(split([word for word in argv if word not in flags]))
    named = choice != Choice() or "--loss" in argv
    options = {o.name: o for o in FILES} | _listed(choice, parts_of(choice))
    if "--help-all" not in argv:
        if named:
            return _details(choice)
        options = {name: options[name] for name in COMMON}
    full = "--help-all" in argv
    title = "options:" if full else "common options (all options: --help-all):"
    reads = "--data DATA" if _names_data(choice) else "--prompts PROMPTS"
    return (
        f"usage: {COMMAND}{choice.about if named else ''} --model MODEL {reads} "
        "--out OUT [options]\n\n"
        "Train a model on preference pairs, labeled answers (--loss kto), lists of "
        "answers\n(--loss plackett_luce), or completions (--loss sft).\n\n"
        f"{title}\n{help.rows(options.values(), full=full)}\n\n{choices_text()}"
    )


def _names_data(choice: Choice) -> bool:
    """Whether it reads records with answers, from `--data`."""
    return choice.sampled is None or choice.reads_pairs


def _listed(choice: Choice, parts: Parts) -> dict[str, Option]:
    """The options of parts for help: those that a run of this choice may read."""
    if choice.sampled is None:
        return {PROMPTS.name: PROMPTS} | options_of(parts)
    refused = UNREAD
    if choice.reads_pairs:
        refused = (*UNREAD, *OF_REWARDS, "eval_data", *OF_EVALUATIONS)
        found = options_of({name: x for name, x in parts.items() if name != "rewards"})
    else:
        found = {PROMPTS.name: PROMPTS} | options_of(parts)
        found.pop("data", None)  # means the same
    return {x: found[x] for x in found if x not in map(canonical, refused)}


def choices_text() -> str:
    """Losses by kind, and objectives."""
    kinds = {kind: " ".join(names) for kind, names in losses_by_kind().items()}
    objectives = {name: summary(f) for name, f in (WRAPPERS | MIXTURES).items()}
    corrections = {name: summary(f) for name, f in CORRECTIONS.items()}
    of_pairs = [name for name in SAMPLED if Choice(sampled=name).reads_pairs]
    return (
        f"losses, --loss NAME (default: dpo):\n{help.table(kinds)}\n\n"
        "corrections of a pairwise loss, --correct NAME:\n"
        f"{help.table(corrections, column=18)}\n\n"
        "objectives that wrap a loss, --objective NAME:\n"
        f"{help.table(objectives, column=18)}\n\n"
        "objectives of sampled answers, --objective NAME --prompts FILE --reward "
        "REWARD:\n"
        f"  {' '.join(name for name in SAMPLED if name not in of_pairs)}; "
        f"{' '.join(of_pairs)} (--data alone)\n\n"
        f"Equation and options: `{COMMAND} --loss NAME --help`, "
        "`--objective NAME --help`."
    )


def _details(choice: Choice) -> str:
    """The equations and options of the chosen loss, correction and objective."""
    texts = [f"usage: {COMMAND}{choice.about} [options]"]
    for field, (_, function) in choice.functions.items():
        options = options_of({field: choice.parts[field]})
        listed = help.rows(options.values(), full=True) or "  none"
        name = function.__name__
        texts.append(f"{name}: {description(function)}\n\noptions of {name}:\n{listed}")
    if choice.sampled:
        names = "sampling", "rewards", "uncertain", "numbers"
        parts = parts_of(choice)
        own = _listed(choice, {name: parts[name] for name in names if name in parts})
        what = "" if choice.reads_pairs else " and their rewards"
        listed = help.rows(own.values(), full=True)
        texts.append(f"options of sampled answers{what}:\n{listed}")
    if choice.mixture:
        mixed = help.rows(options_of({"mix": Part(MixOptions)}).values(), full=True)
        texts.append(f"options of the mixture's data:\n{mixed}")
    texts.append(f"`{COMMAND} --help` lists the other options.")
    return "\n\n".join(texts)
