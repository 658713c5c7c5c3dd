r"""How well does `jaxpref audit` find planted label flips?

Exchanges chosen and rejected in a known share of the pairs, and audits the file.
Reports the AUROC of 1 - p_correct for the planted flips and their share in the 10% most
suspicious pairs.  The prompts are divided by hash into two halves: "development", on
which the audit's settings were chosen, and "report".

Commands
    HH helpful with a tiny model, and with a 135M one:

        python -m benchmarks.inputs hh stories260k smollm2
        python -m benchmarks.audit_planted --max-length 512 --half report \
            --data inputs/hh_rlhf_helpful_base_test.jsonl.gz \
            --model inputs/stories260k-hf --out runs/planted
        python -m benchmarks.audit_planted --max-length 128 --max-prompt-length 48 \
            --data inputs/hh_rlhf_helpful_base_test.jsonl.gz --half report \
            --model inputs/SmolLM2-135M-Instruct --out runs/planted135m

    `--half report` audits the whole file, as a user would, but measures only the report
    half.  Features are computed once for all seeds.  `--flip-rate` changes the share.

Expected
    One column per seed, then mean and standard deviation; also in OUT/results.json: the
    audit, each of the models that it combines (its judges), and the baselines of the
    `audit` extra, if it is installed.  With the tiny model, AUROC 0.699 ± 0.010 and
    lift 2.17 ± 0.13; the length alone has an AUROC of 0.656 ± 0.016, and the baselines
    have 0.652 ± 0.011.  The features of the tiny model take 2.4 minutes of CPU time,
    those of the 135M one 14 minutes.  Without OPENBLAS_NUM_THREADS=1, a busy machine is
    many times slower.  Wrong labels of the original file count as not flipped.  So even
    a perfect audit has an AUROC below 1, and the estimated rate is above the planted
    one.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from jaxpref import data
from jaxpref.data.hashing import hash_uniforms
from jaxpref.data.records import Example, parse, prompt_key
from jaxpref.evaluate import audit
from jaxpref.evaluate.flips import auroc, known_flips
from jaxpref.files import write_json, write_whole
from jaxpref.runtime.entry import entry_point


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlantedConfig:
    """Options of this benchmark."""

    data: str
    """Preference file, whose labels are assumed to be right."""
    model: str
    """Model folder or hub id."""
    out: str
    """Folder for the files with planted flips, the audits, and the results."""
    flip_rate: float = 0.2
    """Share of labels to flip."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that select the flipped pairs."""
    half: Literal["development", "report", "both"] = "both"
    """Half of the prompts on which the audit is measured."""
    alone: bool = False
    """Audit only these prompts instead of the whole file."""
    max_length: int = 1024
    """As in `jaxpref audit`."""
    max_prompt_length: int | None = None
    """As in `jaxpref audit`."""
    folds: int = 5
    """As in `jaxpref audit`."""
    features: str | None = None
    """Folder of cached features (default: OUT/features)."""


def halves(source: data.Source) -> list[str]:
    """The half of each record, by hash of its prompt; "" if it has no pair."""
    found = []
    for row in range(len(source)):
        example = parse(source[row], source.location(row), sides=2, drop_empty=True)
        if isinstance(example, Example):
            (u,) = hash_uniforms([prompt_key(example.prompt)], salt="half")
            found.append("development" if u < 0.5 else "report")
        else:
            found.append("")
    return found


def plant(config: PlantedConfig, seed: int, half: list[str], path: Path) -> None:
    """Writes the file with flipped records, marked by the field `flip`."""
    source = data.open_source(config.data)
    flips = hash_uniforms(map(str, range(len(source))), salt=f"plant {seed}")
    lines = []
    for row, flip in enumerate(flips < config.flip_rate):
        if config.alone and config.half not in ("both", half[row]):
            continue
        record = source[row]
        chosen, rejected = record["chosen"], record["rejected"]
        if flip:
            chosen, rejected = rejected, chosen
        record |= {"chosen": chosen, "rejected": rejected, "flip": bool(flip)}
        lines.append(json.dumps(record | {"planted_row": row}) + "\n")
    write_whole(path, "".join(lines))


def measure(config: PlantedConfig, seed: int, half: list[str]) -> dict:
    """One audit of one planted file."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"planted-{seed}.jsonl"
    plant(config, seed, half, path)
    found = audit.run(
        audit.AuditConfig(
            data=str(path),
            model=config.model,
            out=str(out / f"audit-{seed}"),
            features=config.features or str(out / "features"),
            folds=config.folds,
            max_length=config.max_length,
            max_prompt_length=config.max_prompt_length,
        )
    )
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    planted = [records[row["row"] - 1] for row in found.pairs]
    counted = np.array(
        [config.half in ("both", half[record["planted_row"]]) for record in planted]
    )
    flips = np.array([record["flip"] for record in planted])[counted]
    p, margin = (
        np.array([row[name] for row in found.pairs])[counted]
        for name in ("p_correct", "margin")
    )
    alone = {
        f"{name}_auroc": auroc(-scores[counted], flips)
        for name, scores in found.scores.items()
    }
    return {
        "seed": seed,
        **known_flips(p, margin, flips),
        **alone,
        "model_accuracy": found.summary["model"]["accuracy"],
        "length_accuracy": found.summary["length_only"]["accuracy"],
        "flip_rate": found.summary["flip_rate"],
        "flip_rate_low": found.summary["flip_rate_interval"][0],
        "flip_rate_high": found.summary["flip_rate_interval"][1],
        "identified": found.summary["identified"],
    }


def main() -> None:
    """Runs every seed and prints the table."""
    with entry_point():
        config = tyro.cli(PlantedConfig, description=__doc__)
        half = halves(data.open_source(config.data))
        rows = [measure(config, seed, half) for seed in config.seeds]
        names = [name for name in rows[0] if name not in ("seed", "identified")]
        write_json(Path(config.out) / "results.json", rows)
        print(f"{'':26}" + "".join(f"{'seed ' + str(r['seed']):>10}" for r in rows))
        for name in names:
            # A flip rate that is not identified is None.
            values = [row[name] for row in rows]
            cells = "".join(f"{'-' if x is None else f'{x:.3f}':>10}" for x in values)
            if None not in values and len(values) > 1:
                spread = np.std(values, ddof=1)
                cells += f"   {np.mean(values):.3f} ± {spread:.3f}"
            print(f"{name:26}{cells}")
        print(f"{'identified':26}" + "".join(f"{r['identified']!s:>10}" for r in rows))


if __name__ == "__main__":
    main()
