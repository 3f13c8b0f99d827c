"""Ratios of measurements, and their table, CSV, JSON and figure."""

import csv
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import floor, log10
from statistics import median
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from nnunet_xattnres.common.figures import COLOURS
from nnunet_xattnres.common.text import align_columns
from nnunet_xattnres.nnunet.installation import TRAINER_PREFIX, short_name
from nnunet_xattnres.nnunet.planned_network import PlannedNetwork
from nnunet_xattnres.overhead.measurement import FAILED, MEASURED, Answer

NOTHING = "-"
BACKGROUND = {"facecolor": "white", "edgecolor": "none", "pad": 0}
CHART_PANELS = {
    "step_seconds_ratio": "training step time",
    "peak_memory_bytes_ratio": "peak memory",
    "parameters_ratio": "parameters",
}
INFERENCE_PANELS = {"inference_seconds_ratio": "inference time", "parameters_ratio": "parameters"}


@dataclass
class Row:
    """All rounds of one trainer. A trainer that fails is not measured again: the last answer has the status.

    backend: that the attention was asked to be computed by. None for the trainer's own, and for a network without
        attention.
    """

    trainer: str
    answers: list[Answer] = field(default_factory=list)
    backend: str | None = None

    @property
    def status(self) -> str:
        return self.answers[-1].status if self.answers else MEASURED

    @property
    def reason(self) -> str:
        return self.answers[-1].reason if self.answers else ""

    @property
    def name(self) -> str:
        """The trainer, and the backend if it was chosen."""
        return self.trainer if self.backend is None else f"{self.trainer} ({self.backend})"

    @property
    def label(self) -> str:
        return short_name(self.name)

    @property
    def computed_by(self) -> list[str]:
        """The backends that computed, each with the reason of the first round that it computed.

        On a GPU, every round chooses anew by measuring.
        """
        lines: dict[str, str] = {}
        for answer in self.answers:
            if answer.computed_by is not None:
                other = answer.inference_computed_by
                inference = f"; inference by {other}" if other != answer.computed_by else ""
                lines.setdefault(answer.computed_by, f"{answer.computed_by} ({answer.computed_by_reason}){inference}")
        return list(lines.values())

    def first(self, name: str) -> Any:
        """The value of a field that is the same in all rounds."""
        return getattr(self.answers[0], name) if self.answers else None


@dataclass(frozen=True)
class Comparison:
    """The networks of one configuration. The first is the planned one.

    inference: whether the prediction of a volume was measured, and no training step.
    """

    planned: PlannedNetwork
    rows: list[Row]
    inference: bool = False

    def figures(self, row: Row) -> dict[str, float | None]:
        """Numbers, medians over all repetitions, and their ratios to the planned network. None if not known."""
        reference = self.rows[0]
        steps = [seconds for answer in row.answers for seconds in answer.step_seconds]
        inference = [seconds for answer in row.answers for seconds in answer.inference_seconds]
        memory = [answer.peak_memory for answer in row.answers if answer.peak_memory is not None]
        return {
            "parameters": row.first("parameters"),
            "parameters_ratio": paired_ratio(row, reference, lambda answer: answer.parameters),
            "flops": row.first("flops"),
            "flops_ratio": paired_ratio(row, reference, lambda answer: answer.flops),
            "step_seconds": median(steps) if steps else None,
            "step_seconds_min": min(steps, default=None),
            "step_seconds_max": max(steps, default=None),
            "step_seconds_ratio": paired_ratio(row, reference, lambda answer: _median(answer.step_seconds)),
            "peak_memory_bytes": median(memory) if memory else None,
            "peak_memory_bytes_ratio": paired_ratio(row, reference, lambda answer: answer.peak_memory),
            "kept_for_backward_bytes": row.first("kept_for_backward"),
            "kept_for_backward_bytes_ratio": paired_ratio(row, reference, lambda answer: answer.kept_for_backward),
            "inference_seconds": median(inference) if inference else None,
            "inference_seconds_min": min(inference, default=None),
            "inference_seconds_max": max(inference, default=None),
            "inference_seconds_ratio": paired_ratio(row, reference, lambda answer: _median(answer.inference_seconds)),
        }

    def record(self) -> dict[str, Any]:
        """Everything that is known, for JSON."""
        return self._identity() | {
            "trainers": [
                {
                    "trainer": row.trainer,
                    "backend": row.backend,
                    "status": row.status,
                    "reason": row.reason,
                    "computed_by": row.computed_by,
                    **self.figures(row),
                    "rounds": [asdict(answer) for answer in row.answers],
                }
                for row in self.rows
            ]
        }

    def csv_rows(self) -> list[dict[str, Any]]:
        """One row per trainer, for CSV."""
        identity = self._identity() | {"patch_size": "x".join(map(str, self.planned.manager.patch_size))}
        return [
            identity
            | {"trainer": row.trainer, "backend": row.backend, "status": row.status, "reason": row.reason}
            | {"computed_by": ", or ".join(row.computed_by)}
            | self.figures(row)
            for row in self.rows
        ]

    def _identity(self) -> dict[str, Any]:
        manager = self.planned.manager
        return {
            "name": self.planned.name,
            "plans": self.planned.plans["plans_name"],
            "configuration": self.planned.configuration,
            "patch_size": list(map(int, manager.patch_size)),
            "batch_size": manager.batch_size,
            "stages": manager.network_arch_init_kwargs["n_stages"],
        }


def paired_ratio(row: Row, reference: Row, quantity: Callable[[Answer], float | None]) -> float | None:
    """The median over rounds of row / reference. The two measurements of a round were made one after the other."""
    pairs = [(quantity(ours), quantity(theirs)) for ours, theirs in zip(row.answers, reference.answers, strict=False)]
    ratios = [ours / theirs for ours, theirs in pairs if ours is not None and theirs]
    return median(ratios) if ratios else None


def cost_table(comparison: Comparison) -> str:
    """A line per network, at most 120 columns wide.

    Below: the stages that read, the backends that computed, and the reasons of failures.
    """
    figures = [comparison.figures(row) for row in comparison.rows]
    flops_unit, flops_name = (1e12, "TFLOPs") if any((f["flops"] or 0) >= 1e12 for f in figures) else (1e9, "GFLOPs")
    is_large = any((f["peak_memory_bytes"] or 0) >= 1e8 for f in figures)
    bytes_unit, bytes_name = (1e9, "GB") if is_large else (1e6, "MB")
    training = ["step s", f"memory {bytes_name}", f"kept {bytes_name}", "inference s"]
    timed = ["inference s"] if comparison.inference else training
    rows = [[TRAINER_PREFIX, "parameters", flops_name, *timed]]
    for row, f in zip(comparison.rows, figures, strict=True):
        cells = [
            row.label,
            _with_ratio(f"{_number(f['parameters'], 1e6)} M", f["parameters_ratio"]),
            _with_ratio(_number(f["flops"], flops_unit), f["flops_ratio"]),
            _with_spread(f, "inference_seconds" if comparison.inference else "step_seconds", row.status),
        ]
        if not comparison.inference:
            cells += [
                _with_ratio(_number(f["peak_memory_bytes"], bytes_unit), f["peak_memory_bytes_ratio"]),
                _with_ratio(_number(f["kept_for_backward_bytes"], bytes_unit), f["kept_for_backward_bytes_ratio"]),
                _with_ratio(_number(f["inference_seconds"]), f["inference_seconds_ratio"]),
            ]
        rows.append(cells)
    lines = [comparison.planned.title(), align_columns(rows)]
    # With every backend, a trainer's network reads at the same stages.
    reads_at = {short_name(row.trainer): row.first("reads_at") for row in comparison.rows if row.first("reads_at")}
    for label, stages in reads_at.items():
        lines += wrap(f"{label} reads at: {' '.join(stages)}", 120, subsequent_indent="    ")
    for row in comparison.rows:
        for computed_by in row.computed_by:
            lines += wrap(f"{row.label} computed by: {computed_by}", 120, subsequent_indent="    ")
    lines += [f"{row.label} failed: {row.reason}" for row in comparison.rows if row.status == FAILED]
    return "\n".join(lines)


def csv_lines(comparisons: list[Comparison]) -> str:
    """CSV: a header, and a line for each pair of plans and trainer."""
    rows = [row for comparison in comparisons for row in comparison.csv_rows()]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def draw_ratios(comparisons: list[Comparison]) -> Figure:
    """Bars of ratios to the planned network, for each pair of plans and trainer.

    They are of step time, memory and parameters, or where volumes were predicted, of inference time and parameters.
    """
    panels = INFERENCE_PANELS if comparisons[0].inference else CHART_PANELS
    labels = list(dict.fromkeys(row.label for comparison in comparisons for row in comparison.rows[1:]))
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    height = 1.4 + len(comparisons) * (0.2 + 0.17 * max(1, len(labels)))
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (quantity, title) in zip(axes, panels.items(), strict=True):
        _draw_panel(axis, comparisons, quantity, colours)
        axis.set_title(title, fontsize=10)
    axes[0].set_yticks(range(len(comparisons)), [_short_title(comparison) for comparison in comparisons], fontsize=8)
    axes[0].set_ylim(len(comparisons) - 0.5, -0.5)  # the first on top
    handles: list[Patch | Line2D] = [Patch(color=colour, label=label) for label, colour in colours.items()]
    handles.append(Line2D([], [], color="black", linewidth=1, label="planned network"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), fontsize=9, frameon=False)
    return figure


def _draw_panel(axis: Axes, comparisons: list[Comparison], quantity: str, colours: dict[str, str]) -> None:
    thickness = 0.8 / max(1, len(colours))
    for group, comparison in enumerate(comparisons):
        for i, row in enumerate(comparison.rows[1:]):
            position = group - 0.4 + (i + 0.5) * thickness
            ratio = comparison.figures(row)[quantity]
            if ratio is None:
                text = row.status if row.status != MEASURED else f"planned network: {comparison.rows[0].status}"
            else:
                axis.barh(position, ratio, height=0.9 * thickness, color=colours[row.label])
                text = f"{ratio:.2f}"
            # A text beside the line at 1, not across it.
            place = (0 if ratio is None else max(ratio, 1), position)
            axis.annotate(text, place, (3, 0), textcoords="offset points", va="center", fontsize=7, bbox=BACKGROUND)
    axis.axvline(1, color="black", linewidth=1, zorder=1.5)
    axis.set_xlim(0, 1.15 * max(1, axis.get_xlim()[1]))
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)


def _short_title(comparison: Comparison) -> str:
    planned = comparison.planned
    return f"{planned.name}\n{planned.configuration} of {planned.plans['plans_name']}"


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _with_spread(figures: dict[str, float | None], name: str, status: str) -> str:
    """A time with its shortest and longest repetition, or why there is none."""
    if status != MEASURED:
        return status
    spread = f"[{_number(figures[f'{name}_min'])}, {_number(figures[f'{name}_max'])}]"
    return _with_ratio(f"{_number(figures[name])} {spread}", figures[f"{name}_ratio"])


def _with_ratio(text: str, ratio: float | None) -> str:
    if NOTHING in text.split():
        return NOTHING
    return f"{text} {NOTHING:>5}" if ratio is None else f"{text} {ratio:.2f}x"


def _number(value: float | None, unit: float = 1.0) -> str:
    """Three significant digits, or a whole number."""
    if value is None:
        return NOTHING
    scaled = value / unit
    return f"{scaled:.{max(0, 2 - floor(log10(scaled)))}f}" if scaled > 0 else "0"
