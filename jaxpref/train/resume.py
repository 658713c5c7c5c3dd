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
    ref: str,
) -> None:
    """Compares what lies beside a checkpoint with what is there now.

    Args:
      saved: of the checkpoint, with `plan` and `reference`.
      config: of the run.
      out: its folder, for messages.
      plan: its pairs.
      ref: digest of the reference's weights; empty where it is not known here.

    Raises:
      InputError: if the pairs or the reference changed.
    """
    if saved["plan"] != plan.digest:
        raise InputError(
            f"{' and '.join(config.sources)}: its pairs are not those that the run in "
            f"{out} began with; restore the file, or use another --out"
        )
    if ref and saved["reference"] != ref:
        raise InputError(
            f"{config.reference or config.model}: its weights are not those that the "
            f"run in {out} began with; restore them, or use another --out"
        )
