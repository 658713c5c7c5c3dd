"""Creating and saving figures; matplotlib is imported when the first is drawn."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxpref.files import write_whole
from jaxpref.report.style import MATPLOTLIB

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextlib.contextmanager
def drawing(path: str | Path, *, size: tuple[float, float]) -> "Iterator[Figure]":
    """A figure in the style of the reports, written to `path` on exit.

    Nothing here touches pyplot's global state or a display.

    Args:
      path: the PNG to write.
      size: width and height in inches.

    Raises:
      InputError: if the file cannot be written.
    """
    # Importing matplotlib takes most of a second, and not every run draws something.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(MATPLOTLIB):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        image = io.BytesIO()
        figure.savefig(image, format="png")
    write_whole(path, image.getvalue())
