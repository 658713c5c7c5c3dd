"""Parts of an audit's page: its baselines, verdicts, budgets, and power."""

from collections.abc import Mapping
from typing import Any

from jaxpref.report.html import Table

Record = Mapping[str, Any]

JUDGES = {
    "length": "length",
    "surface": "surface features",
    "words": "words",
    "states": "states of the language model",
    "reward": "rewards of the reward model",
}
"""The judges of an audit, in words."""
BASELINES = {
    "length": "length alone",
    "tfidf_lengths": "TF-IDF and lengths, logistic regression",
    "confident_learning": "confident learning",
}
"""The baselines, in words."""


def comparison(summary: Record) -> list:
    """The audit beside its judges and its baselines."""
    beside = summary["baselines"]
    known = "known_flips" in summary
    area = summary["known_flips"]["auroc"] if known else None
    rows = [_compared("this audit", summary["model"] | {"auroc": area})]
    for name, record in summary["features"].items():
        weight = f", weight {record['weight']:.2f}"
        rows.append(_compared(f"its judge: {JUDGES[name]}{weight}", record))
    for name, record in beside.items():
        rows.append(_compared(f"baseline: {BASELINES[name]}", record or {}))
    columns = ["judged by", "accuracy", "95% interval", "AUROC of known flips"]
    shown = 4 if known else 3
    parts: list = [
        Table(
            columns[:shown],
            [row[:shown] for row in rows],
            "Accuracy: the share of the original labels that the model agrees with.",
        )
    ]
    if missing := summary.get("baselines_missing"):
        parts.append(f"{missing}.")
    elif beside["confident_learning"]:
        wrong = beside["confident_learning"]["wrong_labels"]
        parts.append(f"Confident learning estimates that {wrong} labels are wrong.")
    parts.append(
        "If length alone does nearly as well, the audit mostly flags labels that "
        "prefer answers of unusual length. Read the pairs below before you act on the "
        "results."
    )
    return parts


def _compared(name: str, record: Record) -> list:
    share, interval = record.get("accuracy"), record.get("interval")
    return [
        name,
        None if share is None else f"{share:.3f}",
        None if interval is None else "{:.3f} to {:.3f}".format(*interval),
        None if record.get("auroc") is None else f"{record['auroc']:.3f}",
    ]


def power_in_words(power: Record) -> str:
    """How many pairs a stated interval of the flip rate needs, in a sentence."""
    votes = lambda count: f"{count} vote{'' if count == 1 else 's'} each"
    needs = [
        f"{'no number' if need['pairs'] is None else format(need['pairs'], ',')} with "
        f"{votes(need['votes_per_pair'])}"
        for need in power["needed"]
    ]
    each = power["votes_per_annotator"]
    return (
        f"Pairs needed for a 95% interval of the flip rate that is "
        f"{power['width']:g} wide, at a rate of {power['flip_rate']:.2f} and with "
        f"margins like these: {'; '.join(needs)} (this file has "
        f"{power['now']['pairs']:,}, and its interval is {power['now']['width']:.2f} "
        "wide). For an annotator's reliability, "
        f"{'no number of' if each is None else f'{each:,}'} votes would give such an "
        "interval"
    )


def extra_parts(summary: Record) -> list[str]:
    """Sentences on verified labels, verdicts, a budget, and power."""
    parts = []
    if "trusted" in summary:
        trusted = summary["trusted"]
        parts.append(
            f"The models learned from {trusted['pairs']} verified labels alone. Out of "
            f"fold, they agree with {100 * trusted['accuracy']:.1f}% of these."
        )
    if "verdicts" in summary:
        said = summary["verdicts"]
        parts.append(
            f"Verdicts on {said['right'] + said['wrong'] + said['drop']} labels are "
            f"applied. {said['wrong']} of these labels are wrong; from their "
            f"probabilities, {said['expected_wrong']:.1f} were expected."
        )
    if "budget" in summary:
        looks = summary["budget"]
        parts.append(
            f"`review.csv` lists the {looks['pairs']} pairs that are most worth "
            f"reviewing. {looks['expected_wrong']:.1f} of these labels are expected to "
            f"be wrong, compared with {looks['expected_wrong_at_random']:.1f} of as "
            f"many random ones. The expected gain is {looks['expected_gain']:.1f} "
            f"labels ({looks['expected_gain_at_random']:.1f} for random ones): in "
            "`clean.jsonl`, a right label counts 1, a wrong one −1, and a dropped pair "
            "0."
        )
    if "power" in summary:
        parts.append(f"{power_in_words(summary['power'])}.")
    return parts
