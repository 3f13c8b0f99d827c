"""Pictures of attention weights: of a training, and of a case. Heat maps of targets by sources."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import AbstractPathEffect, withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from skimage.measure import block_reduce

from nnunet_xattnres.common.figures import draw_slice, figure_style, label_colour, write_figure
from nnunet_xattnres.routing.recording import CAVEAT, RoutingHistory, in_pool_order, kind_and_number

# Distinguishable with every kind of colour vision, and in print without colours.
COLOURS = colormaps["viridis"]
SIGNED_COLOURS = colormaps["RdBu"]
# The colour of a line shows the resolution. The palette is Okabe and Ito's, with grey for a yellow too light for lines.
LINE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "black", "0.6")
LINE_STYLES = {"E": "-", "D": "--", "input": "--", "block": "-"}
NOTHING_TO_READ = "0.93"
WEIGHT = "attention weight"
DPI = 120
DPI_IN_PRINT = 300  # of the slices in a PDF
OUTLINE_PIXELS = 128  # along a panel. Its lines are too thick for finer outlines.
LEGEND_LINE = 0.16  # inches
NOTE = 0.2  # inches
TITLE_CHARACTER = 0.1
POINTS_PER_LINE = 250  # enough for a line a few inches long
FONT_SIZE = 8
SMALL_FONT_SIZE = 6.5
INTERVAL_FONT_SIZE = 5


def save_figure(draw: Callable[[], Figure], path: Path) -> None:
    """Draw a figure and write it atomically, in the format of the path's suffix."""
    with figure_style():
        write_figure(draw(), path, DPI_IN_PRINT if path.suffix == ".pdf" else DPI)


class _Page:
    """A figure whose axes are placed in inches from the upper left corner.

    Matplotlib's automatic layouts take several times as long as the drawing.
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height))

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self.height - top - height
        return self.figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))

    def text(self, left: float, top: float, text: str, **alignment: Any) -> None:
        self.figure.text(left / self.width, 1 - top / self.height, text, fontsize=FONT_SIZE, **alignment)


def draw_history(history: RoutingHistory) -> Figure:
    """A heat map of the latest mean weights, targets by sources, and below it a plot per target over the epochs."""
    cell, plot_height, gap, per_row, legend_columns = 0.42, 1.2, 0.45, 4, 8
    targets, sources = list(history.sources), history.all_sources
    map_width, map_height = cell * len(sources), cell * len(targets)
    plots_top = map_height + 1.3
    legend_top = plots_top - (-len(targets) // per_row) * (plot_height + gap) + 0.1
    legend_height = 0.2 * (1 + -(-len(sources) // legend_columns))
    page = _Page(max(map_width + 2.6, 8.0), legend_top + legend_height + 0.1 + NOTE)

    epoch = max(history.epochs)
    _draw_title(page, f"Mean attention weight in the validation of epoch {epoch}")
    weights = {
        (target, source): np.nan if weight is None else weight
        for target, of_target in history.sources.items()
        for source, weight in zip(of_target, history.epochs[epoch][target], strict=True)
    }
    place = (page.width - map_width) / 2, 0.75, map_width, map_height
    _draw_heat_map(page, HeatMap("", WEIGHT, weights), place)
    plot_width = (page.width - 0.6) / per_row
    for i, target in enumerate(targets):
        row, column = divmod(i, per_row)
        left, top = 0.6 + column * plot_width, plots_top + row * (plot_height + gap)
        axis = page.axes(left, top, plot_width - 0.4, plot_height)
        _draw_course(axis, history, target, sources)
        if i + per_row >= len(targets):
            axis.set_xlabel("epoch", fontsize=FONT_SIZE)
        if column == 0:
            axis.set_ylabel("mean weight", fontsize=FONT_SIZE)
    lines = [Line2D([], [], label=source, **_line_style(source, sources)) for source in sources]
    page.figure.legend(
        handles=lines,
        title="solid: encoder, dashed: decoder; one colour for one resolution" if "D0" in sources else None,
        loc="lower center",
        bbox_to_anchor=(0.5, NOTE / page.height),
        ncols=legend_columns,
        fontsize=FONT_SIZE,
        title_fontsize=FONT_SIZE,
        frameon=False,
        handlelength=2.5,
    )
    page.text(page.width / 2, page.height - 0.1, CAVEAT, ha="center", va="bottom")
    return page.figure


@dataclass(frozen=True)
class HeatMap:
    """Numbers by target and source.

    unit: of the colour bar. numbers: NaN where there is none. intervals: a second line, where they are known.
    signed: whether zero is in the middle of the colours.
    """

    title: str
    unit: str
    numbers: Mapping[tuple[str, str], float]
    intervals: Mapping[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    signed: bool = False

    @property
    def targets(self) -> list[str]:
        return list(dict.fromkeys(target for target, _ in self.numbers))

    @property
    def sources(self) -> list[str]:
        return in_pool_order(source for _, source in self.numbers)


def draw_heat_maps(maps: Sequence[HeatMap], note: str) -> Figure:
    """Heat maps of the same targets and sources, one below the other. note: below all of them."""
    cell_width, cell_height, title_height, margin = 0.72, 0.4, 0.95, 0.8
    width, height = cell_width * len(maps[0].sources), cell_height * len(maps[0].targets)
    note_lines = [line for paragraph in note.splitlines() for line in wrap(paragraph, 90)]
    page = _Page(max(width + 2 * margin, 6.5), len(maps) * (height + title_height) + 0.2 + NOTE * len(note_lines))
    left = (page.width - width) / 2
    for i, heat_map in enumerate(maps):
        top = i * (height + title_height) + title_height
        page.text(page.width / 2, top - 0.55, heat_map.title, ha="center", va="bottom")
        _draw_heat_map(page, heat_map, (left, top, width, height))
    page.text(page.width / 2, page.height - 0.1, "\n".join(note_lines), ha="center", va="bottom")
    return page.figure


@dataclass
class CasePicture:
    """One slice of a case and of its weight maps.

    title: names the case and the slice.
    image, prediction: [row, column]. spacing: of rows and columns in mm. labels: the names of the prediction's values.
    maps: by target and source, a slice of the map and its mean over the predicted foreground of the whole case. The
        mean is NaN where nothing is predicted as foreground.
    """

    title: str
    image: NDArray[np.floating]
    prediction: NDArray[np.integer]
    spacing: tuple[float, float]
    labels: dict[int, str]
    maps: dict[str, dict[str, tuple[NDArray[np.floating], float]]] = field(default_factory=dict)


def draw_case(picture: CasePicture) -> Figure:
    """The weights over the image, one row per target and one column per source. Every row has its own colour scale."""
    sources = in_pool_order(chain(*picture.maps.values()))
    (rows, columns), (y_spacing, x_spacing) = picture.image.shape, picture.spacing
    aspect = float(np.clip(rows * y_spacing / (columns * x_spacing), 0.4, 2.5))
    gap, left_margin, right_margin, top_margin = 0.06, 1.0, 0.7, 0.35
    width = float(np.clip(9 / len(sources), 0.75, 1.4))
    height = width * aspect
    rows_top = top_margin + height + 0.45
    title = f"{picture.title}: attention weights"
    page = _Page(
        max(left_margin + len(sources) * (width + gap) + right_margin, 5.5, TITLE_CHARACTER * len(title)),
        rows_top + len(picture.maps) * (height + gap) + 0.2 + 2 * NOTE,
    )
    _draw_title(page, title)
    for i, labels in enumerate((None, picture.prediction)):
        axis = page.axes(left_margin + i * (width + gap), top_margin, width, height)
        draw_slice(axis, picture.image, picture.spacing, labels)
    present = [value for value in np.unique(picture.prediction) if value]
    # The legend is as high as one row. That includes its title and the line "and ... more".
    named = present[: max(1, int(height / LEGEND_LINE) - 2)]
    handles = [Patch(color=label_colour(value), label=picture.labels[value]) for value in named]
    if len(present) > len(named):
        handles.append(Patch(color="none", label=f"and {len(present) - len(named)} more"))
    page.figure.legend(
        handles=handles,
        title="image and prediction",
        loc="center left",
        bbox_to_anchor=((left_margin + 2 * (width + gap)) / page.width, 1 - (top_margin + height / 2) / page.height),
        fontsize=FONT_SIZE,
        title_fontsize=FONT_SIZE,
        frameon=False,
    )
    end = left_margin + len(sources) * (width + gap)
    for row, (target, maps) in enumerate(picture.maps.items()):
        top = rows_top + row * (height + gap)
        scale = Normalize(0, max(max(float(weights.max()) for weights, _ in maps.values()), 1e-6))
        page.text(left_margin - 0.1, top + height / 2, target, ha="right", va="center")
        for source, (weights, mean) in maps.items():
            left = left_margin + sources.index(source) * (width + gap)
            _draw_weights(page.axes(left, top, width, height), picture, weights, mean, scale)
        _draw_colour_bar(page.axes(end + 0.04, top + 0.08, 0.08, height - 0.16), scale)
    rows_centre = rows_top + len(picture.maps) * (height + gap) / 2
    page.text(page.width - 0.1, rows_centre, WEIGHT, rotation=90, ha="right", va="center")
    for column, source in enumerate(sources):
        page.text(left_margin + column * (width + gap) + width / 2, rows_top - 0.06, source, ha="center", va="bottom")
    has_means = not any(np.isnan(mean) for maps in picture.maps.values() for _, mean in maps.values())
    numbers = "numbers: mean over the predicted foreground of the whole case"
    no_numbers = "no numbers: nothing is predicted as foreground in the whole case"
    page.text(
        0.1,
        page.height - 0.1,
        f"rows: targets; columns: sources\n{numbers if has_means else no_numbers}\n{CAVEAT}",
        ha="left",
        va="bottom",
    )
    return page.figure


def _draw_weights(
    axis: Axes, picture: CasePicture, weights: NDArray[np.floating], mean: float, scale: Normalize
) -> None:
    draw_slice(axis, picture.image, picture.spacing)
    pixel_aspect = picture.spacing[0] / picture.spacing[1]
    axis.imshow(weights, cmap=COLOURS, norm=scale, alpha=0.8, aspect=pixel_aspect)
    outlined: list[AbstractPathEffect] = [withStroke(linewidth=1.6, foreground="black")]
    step = -(-max(weights.shape) // OUTLINE_PIXELS)
    foreground = block_reduce(picture.prediction > 0, step, np.mean)
    if foreground.min() < 0.5 < foreground.max():
        rows, columns = (step * np.arange(extent) + (step - 1) / 2 for extent in foreground.shape)
        contours = axis.contour(columns, rows, foreground, levels=[0.5], colors="white", linewidths=0.7)
        contours.set_path_effects(outlined)
    axis.text(
        0.04,
        0.04,
        "" if np.isnan(mean) else f"{mean:.2f}",
        transform=axis.transAxes,
        color="white",
        fontsize=SMALL_FONT_SIZE,
        path_effects=outlined,
    )


def _draw_title(page: _Page, title: str) -> None:
    page.figure.suptitle(title, fontsize=10, y=1 - 0.1 / page.height, va="top")


def _draw_heat_map(page: _Page, heat_map: HeatMap, place: tuple[float, float, float, float]) -> None:
    targets, sources = heat_map.targets, heat_map.sources
    numbers = np.full((len(targets), len(sources)), np.nan)
    for (target, source), number in heat_map.numbers.items():
        numbers[targets.index(target), sources.index(source)] = number
    largest = np.nanmax(np.abs(numbers), initial=0.0) or 1.0
    scale = Normalize(-largest if heat_map.signed else 0, largest)
    colours = SIGNED_COLOURS if heat_map.signed else COLOURS
    axis = page.axes(*place)
    axis.pcolormesh(np.ma.masked_invalid(numbers), cmap=colours, norm=scale, edgecolors="white", linewidth=0.5)
    decimals = 3 if heat_map.intervals else 2

    def shown(number: float) -> str:
        return f"{round(number, decimals) + 0.0:.{decimals}f}"  # no minus sign before zero

    for (row, column), number in np.ndenumerate(numbers):
        if np.isnan(number):
            continue
        _, green, _, _ = colours(scale(number))  # the most of what the eye takes for lightness
        text: dict[str, Any] = {"ha": "center", "va": "center", "color": "black" if green > 0.55 else "white"}
        low, high = heat_map.intervals.get((targets[row], sources[column]), (np.nan, np.nan))
        has_interval = not np.isnan(low)
        shift = 0.3 if has_interval else 0.5
        axis.text(column + 0.5, row + shift, shown(number), fontsize=SMALL_FONT_SIZE, **text)
        if has_interval:
            axis.text(column + 0.5, row + 0.75, f"{shown(low)}, {shown(high)}", fontsize=INTERVAL_FONT_SIZE, **text)
    axis.set_xticks(np.arange(len(sources)) + 0.5, sources, fontsize=FONT_SIZE)
    axis.set_yticks(np.arange(len(targets)) + 0.5, targets, fontsize=FONT_SIZE)
    axis.set(ylim=(len(targets), 0), facecolor=NOTHING_TO_READ)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("source", fontsize=FONT_SIZE)
    axis.xaxis.set_label_position("top")
    axis.set_ylabel("target", fontsize=FONT_SIZE)
    if np.isnan(numbers).all():
        axis.text(0.5, 0.5, "undefined", transform=axis.transAxes, ha="center", va="center", fontsize=FONT_SIZE)
        return
    left, top, width, height = place
    bar = page.axes(left + width + 0.12, top, 0.12, height)
    _draw_colour_bar(bar, scale, colours)
    bar.set_ylabel(heat_map.unit, fontsize=FONT_SIZE)


def _draw_course(axis: Axes, history: RoutingHistory, target: str, all_sources: list[str]) -> None:
    epochs = sorted(history.epochs)
    points = min(len(epochs), POINTS_PER_LINE)
    epochs = [epochs[i] for i in np.linspace(0, len(epochs) - 1, points).round().astype(int)]
    for k, source in enumerate(history.sources[target]):
        weights = [history.epochs[epoch][target][k] for epoch in epochs]
        course = np.array([np.nan if weight is None else weight for weight in weights])
        # A single epoch is a point, which a line does not show.
        axis.plot(epochs, course, marker="." if len(epochs) == 1 else "", **_line_style(source, all_sources))
    axis.set_title(target, fontsize=FONT_SIZE, pad=3)
    axis.set_ylim(bottom=0)
    axis.margins(x=0.02)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.tick_params(labelsize=SMALL_FONT_SIZE, length=2, pad=2)
    axis.spines[["top", "right"]].set_visible(False)


def _line_style(source: str, sources: list[str]) -> dict[str, Any]:
    """One colour per resolution, the highest first, with dashes for the decoder. At block level, one per block."""
    if source == "current":
        return {"color": "black", "linestyle": ":", "linewidth": 1.2}
    kind, number = kind_and_number(source)
    # A decoder stage has the resolution of the encoder stage at the other end of its skip connection.
    level = len([name for name in sources if name.startswith("E")]) - 2 - number if kind == "D" else number
    again, colour = divmod(level, len(LINE_COLOURS))
    return {"color": LINE_COLOURS[colour], "linestyle": LINE_STYLES[kind], "linewidth": 0.6 if again else 1.2}


def _draw_colour_bar(axis: Axes, scale: Normalize, colours: Colormap = COLOURS) -> None:
    bar = axis.figure.colorbar(ScalarMappable(scale, colours), cax=axis, ticks=MaxNLocator(3))
    bar.outline.set_visible(False)
    axis.tick_params(labelsize=SMALL_FONT_SIZE, length=2, pad=2)
