"""Figures: their style, their files, and slices of images with label maps."""

from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nnunet_xattnres.common.files import written_atomically

# The palette of Okabe and Ito, which people with colour vision deficiencies can tell apart.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


def figure_style() -> AbstractContextManager[None]:
    """Matplotlib's defaults, which nnU-Net's progress plot changes for the whole process. In a PDF, text stays text."""
    return style.context(["default", {"pdf.fonttype": 42}])


def write_figure(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write the figure, as a whole or not at all. The path's suffix says the format."""
    with written_atomically(path) as temporary:
        kind = path.suffix[1:].lower()
        # Without the time of creation, the same figure gives the same bytes.
        figure.savefig(temporary, format=kind, dpi=dpi, metadata={"CreationDate": None} if kind == "pdf" else None)


def draw_slice(
    axis: Axes, image: NDArray[np.floating], spacing: tuple[float, float], labels: NDArray[np.integer] | None = None
) -> None:
    """Draw a slice [y, x] in grey and a label map [y, x] in colours on top of it. spacing: of y and x in mm."""
    pixel_aspect = spacing[0] / spacing[1]
    darkest, brightest = np.percentile(image, (1, 99.5))
    axis.imshow(image, cmap="gray", vmin=darkest, vmax=brightest, aspect=pixel_aspect)
    if labels is not None:
        overlay = np.zeros((*labels.shape, 4))
        for value in np.unique(labels[labels > 0]):
            overlay[labels == value] = to_rgba(label_colour(value), alpha=0.65)
        axis.imshow(overlay, interpolation="nearest", aspect=pixel_aspect)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def label_colour(value: int) -> str:
    """The colour of a foreground value in a label map."""
    return COLOURS[(int(value) - 1) % len(COLOURS)]
