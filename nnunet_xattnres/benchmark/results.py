"""What follows from the tables of a report."""

from dataclasses import dataclass
from typing import Any

from nnunet_xattnres.benchmark.cells import FINISHED
from nnunet_xattnres.benchmark.comparisons import compare
from nnunet_xattnres.benchmark.learning_curves import flatness, steps_to_target
from nnunet_xattnres.benchmark.summaries import spreads, summarise
from nnunet_xattnres.benchmark.tables import Tables

UNKNOWN_DEVICE = "unknown device"
UNKNOWN_VERSIONS = "unknown versions"
LEARNING = ("flatness", "steps_to_target")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Results:
    """The rows of `summarise`, `compare` and `spreads`, and those of learning curves by name, if there are curves."""

    summary: Rows
    comparisons: Rows
    spreads: Rows
    learning: dict[str, Rows]

    @property
    def first(self) -> str | None:
        """The trainer that the others are compared with; None if there are no comparisons."""
        return self.comparisons[0]["second"] if self.comparisons else None

    @property
    def with_first(self) -> Rows:
        return [row for row in self.comparisons if row["second"] == self.first]

    @property
    def without_first(self) -> Rows:
        return [row for row in self.comparisons if row["second"] != self.first]


def results_of(tables: Tables) -> Results:
    has_curves = not tables.label_curves.empty
    learning = dict(zip(LEARNING, (flatness(tables), steps_to_target(tables)), strict=True)) if has_curves else {}
    return Results(summarise(tables), compare(tables), spreads(tables), learning)


def versions_of(tables: Tables) -> list[str]:
    """The versions and devices that have trained, and the versions that have measured, a line each."""
    finished = tables.cells[tables.cells.state == FINISHED]
    trained = sorted(
        {
            f"trained: {row.versions or UNKNOWN_VERSIONS}; {row.device or UNKNOWN_DEVICE}"
            for row in finished.itertuples()
        }
    )
    measured = "; ".join(f"{row.package} {row.version}" for row in tables.versions.itertuples())
    several = ", ".join(tables.versions.package[tables.versions.package.duplicated()].unique())
    mixed = [f"measured by several versions of {several}: trainings were taken over from another report"]
    return [*trained, f"measured: {measured}", *(mixed if several else [])]
