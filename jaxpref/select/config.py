"""Options of `jaxpref data select`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from jaxpref.data import RecordOptions
from jaxpref.data.mixing import Data, read_mixture
from jaxpref.errors import InputError
from jaxpref.runtime.mesh import MeshConfig
from jaxpref.runtime.ranges import at_least

Method = Literal[
    "column",
    "agreement",
    "duplicates",
    "ches",
    "normalized-ches",
    "fifa",
    "donod",
]
Dtype = Literal["float32", "bfloat16"]
BOUNDS = ("keep", "min", "max")
"""Options that say how many records are kept."""
MODEL = ("batch_size", "max_length", "compute_dtype", "mesh")
"""Options that only a model needs."""


class Reads(NamedTuple):
    """Which options a method reads besides those that all read."""

    needs: tuple[str, ...] = ()
    """Those without which it cannot work."""
    may: tuple[str, ...] = ()
    """Those that it reads if they are given."""
    kinds: tuple[str, ...] = ("pairs",)
    """What it can read of each record."""
    keeps: str = "highest"
    """Which scores `--keep` keeps: the "highest" or the "lowest"; "" if there are no
    scores."""


READS: Mapping[str, Reads] = {
    "column": Reads(
        ("column",), ("lowest",), kinds=("pairs", "answers", "labeled", "lists")
    ),
    "agreement": Reads(),
    "duplicates": Reads(
        may=("of", "similarity"),
        kinds=("pairs", "answers", "labeled", "lists"),
        keeps="",
    ),
    "ches": Reads(("model",), MODEL, keeps="lowest"),
    "normalized-ches": Reads(("model",), MODEL, keeps="lowest"),
    "fifa": Reads(
        ("column",),
        ("model", *MODEL, "quality", "quality_weight", "diversity_weight", "neighbors"),
    ),
    "donod": Reads(("model",), MODEL, kinds=("pairs", "answers")),
}
"""The options of each method."""
OWN = sorted({x for reads in READS.values() for x in (*reads.needs, *reads.may)})
"""Options that not all methods read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectConfig(RecordOptions):
    """Options of `jaxpref data select`."""

    data: Data
    """The data, as for `jaxpref train`: one or several files, without weights."""
    by: Method
    """What is scored: a number in a field (column), the share of the votes that agree
    with the label (agreement), repeated records (duplicates), how much training on the
    pair lowers the likelihood of both answers (ches, or normalized-ches to compare
    pairs of different lengths), preference margin, quality and diversity (fifa), or
    how a gradient step changes the norm of the LM head (donod)."""
    out: str
    """File to write: .jsonl, .parquet or .array_record.  The records are unchanged."""
    scores: str | None = None
    """JSONL file with the score of every record, and why it was left out (default:
    --out with the suffix .scores.jsonl)."""
    keep: int | float | None = None
    """How many of the records that have a score are kept: a number, such as 1000, or a
    share with a decimal point, such as 0.8.  The lowest scores are kept for ches and
    normalized-ches, and the highest for all others."""
    min: float | None = None
    """Lowest score to keep."""
    max: float | None = None
    """Highest score to keep."""
    seed: int = 0
    """Decides between equal scores, and seeds the hashes of near-duplicates."""
    kind: Literal["pairs", "answers", "labeled", "lists"] = "pairs"
    """What is read of each record, as for `jaxpref data inspect`."""
    column: str | None = None
    """Field with the number; for fifa, the margin between the two answers.  A dotted
    path leads into objects."""
    lowest: bool = False
    """Keep the lowest numbers of the column instead of the highest."""
    of: Literal["record", "prompt"] = "record"
    """What duplicates have in common: the record (prompt, answers and annotator), or
    only the prompt."""
    similarity: float = 1.0
    """Smallest share of common word 3-grams that makes two texts duplicates; 1 for
    texts that differ only in case and whitespace."""
    quality: str | None = None
    """Field with the quality of the text, for fifa."""
    quality_weight: float = 1.0
    """Weight of the quality, for fifa."""
    diversity_weight: float = 1.0
    """Weight of the diversity, for fifa."""
    neighbors: int = 5
    """The distance is that to the nearest other prompt of this rank, for fifa."""
    model: str | None = None
    """Hugging Face model folder, or a Hub ID.  Without one, fifa measures distances
    between the words of prompts (TF-IDF)."""
    batch_size: int = 32
    """Records that the model reads at once, over all devices."""
    max_length: int | None = None
    """Maximum tokens of prompt and completion together (default: 1024, or the model's
    context if that is shorter)."""
    compute_dtype: Dtype | None = None
    """Dtype of matrix products and activations (default: bfloat16 on TPU and GPU,
    float32 on CPU)."""
    mesh: MeshConfig = MeshConfig()
    """Layout of the devices."""

    def __post_init__(self):
        super().__post_init__()
        at_least(1, self, "batch_size", "neighbors")
        at_least(2, self, "max_length")
        at_least(0, self, "quality_weight", "diversity_weight")
        if read_mixture(self.data).weights is not None:
            raise InputError(
                f"--data {self.named}: files to select from have no weights;"
                " leave them out"
            )
        reads = READS[self.by]
        defaults = {x.name: x.default for x in dataclasses.fields(SelectConfig)}
        given = [n for n in (*OWN, *BOUNDS) if getattr(self, n) != defaults[n]]
        for name in reads.needs:
            if name not in given:
                raise InputError(f"--by {self.by}: needs {_flag(name)}")
        others = BOUNDS if reads.keeps else ()
        for name in given:
            if name not in (*reads.needs, *reads.may, *others):
                raise InputError(
                    f"{_flag(name)}: --by {self.by} does not read it; leave it out"
                )
        if self.by == "fifa" and self.model is None:
            for name in MODEL:
                if name in given:
                    raise InputError(f"{_flag(name)}: has no effect without --model")
        if self.quality is None and "quality_weight" in given:
            raise InputError("--quality-weight: has no effect without --quality")
        if reads.keeps and not {*given} & {*BOUNDS}:
            raise InputError(
                f"--by {self.by}: give --keep, --min or --max; all records would be"
                " kept"
            )
        if self.kind not in reads.kinds:
            raise InputError(
                f"--kind {self.kind}: --by {self.by} reads"
                f" {' and '.join(reads.kinds)} only"
            )
        self._check_ranges()

    def _check_ranges(self) -> None:
        """Checks how many records are kept, and how similar duplicates are."""
        share = isinstance(self.keep, float)
        if self.keep is not None and not 0 < self.keep <= (1 if share else self.keep):
            raise InputError(
                f"--keep {self.keep}: must be a number of records, 1 or more, or a"
                " share above 0.0 and at most 1.0"
            )
        if None not in (self.min, self.max) and self.min > self.max:  # pyright: ignore
            raise InputError(f"--min {self.min}: is above --max {self.max}")
        if not 0 < self.similarity <= 1:
            raise InputError(
                f"--similarity {self.similarity}: must be above 0 and at most 1"
            )

    @property
    def files(self) -> tuple[str, ...]:
        """The data, one name for each file or dataset."""
        return read_mixture(self.data).names

    @property
    def named(self) -> str:
        """The data, for messages."""
        return " and ".join(self.files)

    @property
    def keeps(self) -> str:
        """Which scores are kept: "highest", "lowest", or "" without scores."""
        return "lowest" if self.lowest else READS[self.by].keeps

    @property
    def scores_file(self) -> str:
        """The file of scores."""
        out = Path(self.out)
        return self.scores or str(out.with_name(f"{out.stem}.scores.jsonl"))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
