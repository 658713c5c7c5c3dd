"""Whether a run that is resumed is still the one that began."""

from pathlib import Path

from jaxpref.data import Splits
from jaxpref.errors import InputError
from jaxpref.train.config import TrainConfig


def check_same(
    saved: dict,
    config: TrainConfig,
    out: Path,
    plan: Splits,
    rows: int | None,
    ref: str,
) -> None:
    """Compares what lies beside a checkpoint with what is there now.

    Args:
      saved: of the checkpoint, with `plan`, `rows` and `reference`.
      config: of the run.
      out: its folder, for messages.
      plan: its pairs.
      rows: of a packed batch; None where a row is one pair.
      ref: digest of the reference's weights; empty where it is not known here.

    Raises:
      InputError: if the pairs, the shape of a packed batch or the reference changed.
    """
    if saved["plan"] != plan.digest:
        raise InputError(
            f"{' and '.join(config.sources)}: its pairs are not those that the run in "
            f"{out} began with; restore the file, or use another --out"
        )
    if saved.get("rows") != rows:
        raise InputError(
            f"the run in {out} has batches of {saved.get('rows')} packed rows, "
            f"on this mesh they would have {rows}; use its mesh, or another --out"
        )
    if ref and saved["reference"] != ref:
        raise InputError(
            f"{config.reference or config.model}: its weights are not those that the "
            f"run in {out} began with; restore them, or use another --out"
        )
