"""How well does `jaxpref audit` find planted flips, beside its baselines?

Commands
    python -m benchmarks.inputs hh ukp gsm8k llamafactory qa_feedback stories260k
    python -m experiments.audits
    python -m experiments.audits --smoke    (one draw of flips, and few labels)

    The baselines need the `audit` extra.  Without OPENBLAS_NUM_THREADS=1, a busy
    machine is many times slower.  Two more datasets are audited if they are in the data
    folder: `ultrafeedback_sample_train.jsonl.gz`, with a `prompt`, a `chosen` and a
    `rejected` answer per line, and `mtbench_human_pairs.jsonl.gz`, with the `prompt`
    (a list of turns), the answers `a` and `b` of two models, and `votes`, each with
    its `judge` and its `winner` (a, b or tie).

Expected
    The tables are in docs/audit.md.  Audits of one dataset with 18 draws of flips take
    about a minute of CPU time, and its features up to a minute.

Protocol
    At most 600 labels of each dataset, at random (`--most`).  10, 20 and 30% of the
    labels are flipped: all with the same probability ("symmetric"), or those of half of
    the annotators with twice the probability of the others' ("by annotator").  MT-bench
    names its judges; the other labels get one of 20 annotators at random.  The audit
    reads their names.  Wrong labels of the original file count as not flipped, so even
    a perfect audit has an AUROC below 1.  The default settings of the audit, with
    features of a language model with 260 thousand parameters, which reads at most 512
    tokens of prompt and answer; lengths are those of the whole texts.  How the judges
    are weighted, and how strongly reliabilities are shrunk, was chosen with seeds 100
    to 102 on GSM8K, LLaMA-Factory, MT-bench, and UKP.  The default seeds were used for
    the table, which first showed that the shrinkage was too weak, and for nothing else.

    AUROC: of the probability that a label is wrong, or of a baseline's score, for
    finding the flips.  The difference from a baseline is the mean over all draws of
    flips; its interval (95%, Student's t) treats rates and kinds of noise as strata.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import tyro

from experiments import audits_data
from experiments.audits_data import FILES, NOISES
from jaxpref.errors import InputError
from jaxpref.evaluate import audit
from jaxpref.evaluate.audit_inputs import open_pairs, part_of
from jaxpref.evaluate.baselines import rankings
from jaxpref.evaluate.crossfit import prompt_folds
from jaxpref.evaluate.estimate import estimate
from jaxpref.evaluate.flips import auroc, known_flips
from jaxpref.evaluate.judges import columns_of
from jaxpref.evaluate.recurring import with_strengths
from jaxpref.evaluate.stack import stack
from jaxpref.evaluate.votes import Votes, votes_of
from jaxpref.files import write_json, write_whole
from jaxpref.report import mean_spread
from jaxpref.runtime.entry import entry_point

Run = Mapping[str, Any]

BASELINES = {
    "length": "length",
    "tfidf_lengths": "TF-IDF and lengths",
    "confident_learning": "confident learning",
}
"""The baselines, in words."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this experiment."""

    data_dir: str = "inputs"
    """Folder with the data."""
    model: str = "inputs/stories260k-hf"
    """Model whose features the audit reads."""
    out: str = "runs/audits"
    """Folder for features and results.  Finished audits are not repeated."""
    datasets: tuple[str, ...] = ()
    """Datasets to audit (default: all that are in the data folder)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the flips."""
    rates: tuple[float, ...] = (0.1, 0.2, 0.3)
    """Shares of labels to flip."""
    most: int = 600
    """Maximum number of labels of a dataset."""
    max_length: int = 512
    """Maximum tokens that the model reads of a prompt and an answer."""
    smoke: bool = False
    """A quick check: one seed, one rate, and 150 labels of each dataset."""


def main(options: Options) -> None:
    """Audits every dataset with every draw of flips, and prints the tables."""
    if options.smoke:
        options = dataclasses.replace(options, seeds=(0,), rates=(0.2,), most=150)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    runs = [run for name in _present(options) for run in _runs(options, out, name)]
    write_json(out / "results.json", {"runs": runs, "differences": differences(runs)})
    text = "\n\n".join(map(markdown, (table(runs), verdicts(runs))))
    write_whole(out / "tables.md", f"{text}\n")
    print(text)


def _present(options: Options) -> list[str]:
    """The datasets to audit."""
    if unknown := set(options.datasets) - set(FILES):
        raise InputError(
            f"--datasets {unknown.pop()}: no such dataset; expected {', '.join(FILES)}"
        )
    folder, found = Path(options.data_dir), []
    for name in options.datasets or FILES:
        if (folder / FILES[name][0]).exists():
            found.append(name)
        else:
            print(f"{folder / FILES[name][0]}: missing; {name} is left out")
    if not found:
        raise InputError(
            f"--data-dir {folder}: no data; run `python -m benchmarks.inputs`"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Labels:
    """N labels of a file, and what the audit reads of them.

    Flipping a label changes the sign of its columns, and nothing else.
    """

    columns: Mapping[str, np.ndarray]
    """float64 [N, features] by judge."""
    answers: Sequence[tuple[str, str]]
    """The preferred and the other answer."""
    folds: Sequence[np.ndarray]
    """Outer and inner fold of each pair."""
    votes: Votes
    """Who prefers which answer."""


def _runs(options: Options, out: Path, name: str) -> list[Run]:
    """The audits of a dataset with every draw of flips; stored ones are read."""
    words = name.lower().replace(",", "").replace(" ", "_")
    path, stored = (out / f"{words}-{options.most}{end}" for end in (".jsonl", ".json"))
    done = json.loads(stored.read_text("utf-8")) if stored.exists() else []
    keys = [
        {"dataset": name, "noise": noise, "rate": rate, "seed": seed}
        for noise in NOISES
        for rate in options.rates
        for seed in options.seeds
    ]
    left = [key for key in keys if not any(key.items() <= run.items() for run in done)]
    if left:
        records = audits_data.read(Path(options.data_dir), name, most=options.most)
        write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
        labels = _labels(options, path)
    for key in left:
        how = {word: key[word] for word in ("rate", "noise", "seed")}
        planted = audits_data.plant(labels.votes.annotator_names, **how)
        done.append(key | measured(labels, planted))
        write_json(stored, done)
        areas = (f"{k} {x:.3f}" for k, x in done[-1]["auroc"].items())
        print(*key.values(), "|", *areas, flush=True)
    return [run for key in keys for run in done if key.items() <= run.items()]


def _labels(options: Options, path: Path) -> Labels:
    """Reads a file, with the settings of an audit."""
    config = audit.AuditConfig(
        data=str(path),
        model=options.model,
        out=options.out,
        max_length=options.max_length,
        compute_dtype="float32",
    )
    folder = Path(options.model)
    opened = open_pairs(config.data, config, folder, None)
    part = part_of(opened, config, folder)
    return Labels(
        columns_of(part)[0],
        part.answers,
        [
            prompt_folds(part.keys, folds=config.folds, seed=config.seed + n)
            for n in range(2)
        ],
        votes_of(opened.pairs),
    )


def measured(labels: Labels, planted: audits_data.Plant) -> Run:
    """The figures of one audit: counts, `auroc` by ranking, and weights of judges."""
    flips = planted.flips
    if not flips.any():
        raise InputError("no label was flipped; use more labels or a higher rate")
    signs = np.where(flips, -1.0, 1.0)[:, None]
    columns = {name: x * signs for name, x in labels.columns.items()}
    found, votes = stack(columns, *labels.folds), voted(labels.votes, planted)
    judged = estimate(
        found.margins,
        votes.annotators,
        items=votes.items,
        orientation=votes.orientation,
        num_annotators=len(votes.names),
        assumed_flip_rate=0.1,
    )
    judged = with_strengths(judged, votes, assumed_flip_rate=0.1)
    answers = [x[::-1] if flip else x for x, flip in zip(labels.answers, flips)]
    beside = {"length": found.alone["length"]}
    for name, ranking in rankings(answers, labels.folds[0]).items():
        beside[name] = ranking.scores
    areas = lambda scores: {name: auroc(-x, flips) for name, x in scores.items()}
    return {
        "labels": len(flips),
        "flipped": float(flips.mean()),
        "lift": known_flips(judged.posterior, found.margins, flips)["lift"],
        "identified": judged.identified,
        "auroc": areas({"audit": judged.posterior, **beside}),
        "judges": areas({"all": found.margins, **found.alone}),
        "weights": dict(found.weights),
    }


def voted(votes: Votes, planted: audits_data.Plant) -> Votes:
    """The votes of these annotators, with the flips."""
    flipped = dataclasses.replace(
        votes,
        orientation=np.where(planted.flips, -1, 1) * votes.orientation,
        answers=np.where(planted.flips[:, None], votes.answers[:, ::-1], votes.answers),
    )
    if list(planted.annotators) == list(votes.annotator_names):
        return flipped
    names, index = np.unique(np.array(planted.annotators), return_inverse=True)
    return dataclasses.replace(
        flipped, annotators=index, names=names.tolist(), items=votes.texts
    )


def differences(runs: Sequence[Run]) -> list[Run]:
    """By dataset and baseline, the audit's AUROC minus the baseline's.

    Returns:
      `dataset`, `baseline`, `mean`, and its 95% interval `low` to `high`.
    """
    found = []
    for dataset in dict.fromkeys(run["dataset"] for run in runs):
        mine = [run for run in runs if run["dataset"] == dataset]
        for name in BASELINES:
            if any(name not in run["auroc"] for run in mine):
                continue
            cells: dict[tuple, list[float]] = {}
            for run in mine:
                gain = run["auroc"]["audit"] - run["auroc"][name]
                cells.setdefault((run["noise"], run["rate"]), []).append(gain)
            low, mean, high = stratified(list(cells.values()))
            found.append(
                {"dataset": dataset, "baseline": name}
                | {"mean": mean, "low": low, "high": high}
            )
    return found


def stratified(cells: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """The mean of the means of strata, between the ends of its 95% interval.

    The strata have the same variance, which is estimated from all of them; NaN as ends
    if every stratum has a single value.
    """
    mean = float(np.mean([np.mean(cell) for cell in cells]))
    freedom = sum(len(cell) - 1 for cell in cells)
    if not freedom:
        return float("nan"), mean, float("nan")
    variance = sum(np.var(cell) * len(cell) for cell in cells) / freedom
    error = np.sqrt(variance * sum(1 / len(cell) for cell in cells)) / len(cells)
    half = float(scipy.stats.t.ppf(0.975, freedom) * error)
    return mean - half, mean, mean + half


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Mean and standard deviation over seeds; a heading, and a row per stratum."""
    names = [name for name in ("audit", *BASELINES) if name in runs[0]["auroc"]]
    words = {"audit": "**the audit**"} | BASELINES
    rows = [["labels of", "flips", "share", *(words[name] for name in names)]]
    strata = dict.fromkeys((run["dataset"], run["noise"], run["rate"]) for run in runs)
    for dataset, noise, rate in strata:
        mine = [
            run["auroc"]
            for run in runs
            if (run["dataset"], run["noise"], run["rate"]) == (dataset, noise, rate)
        ]
        cells = (mean_spread([one[name] for one in mine], digits=3) for name in names)
        rows.append([dataset, noise, f"{100 * rate:.0f}%", *cells])
    return rows


def verdicts(runs: Sequence[Run]) -> list[list[str]]:
    """Whether the audit ranks below a baseline beyond noise; a row per dataset."""
    found = differences(runs)
    names = [name for name in BASELINES if any(d["baseline"] == name for d in found)]
    heads = (f"minus {BASELINES[name]}" for name in names)
    rows = [["labels of", "number", "audit", *heads, "verdict"]]
    for dataset in dict.fromkeys(d["dataset"] for d in found):
        mine = {d["baseline"]: d for d in found if d["dataset"] == dataset}
        audited = [run for run in runs if run["dataset"] == dataset]
        area = np.mean([run["auroc"]["audit"] for run in audited])
        cells = (_difference(mine[name]) for name in names)
        count = str(audited[0]["labels"])
        said = verdict(list(mine.values()))
        rows.append([dataset, count, f"{area:.3f}", *cells, said])
    return rows


def verdict(mine: Sequence[Run]) -> str:
    """What the differences from all baselines say, in words."""
    below = [BASELINES[d["baseline"]] for d in mine if d["high"] < 0]
    if below:
        return f"below {' and '.join(below)}"
    if all(d["low"] > 0 for d in mine):
        return "above all baselines"
    return "not below any beyond noise"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _difference(one: Run) -> str:
    return f"{one['mean']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})"


if __name__ == "__main__":
    with entry_point():
        main(tyro.cli(Options, description=__doc__))
