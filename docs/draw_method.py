"""Draw the README's figure of the method: draw_method.py OUTPUT"""

import sys

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

# Okabe and Ito's colours, which colour-blind readers can tell apart.
ENCODER, DECODER, CURRENT, INK = "#56B4E9", "#E69F00", "#009E73", "#222222"
STAGES = 4


def main(output: str) -> None:
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    network, reading = figure.subplots(1, 2, width_ratios=(1, 1.7))
    draw_network(network)
    draw_reading(reading)
    for axes in (network, reading):
        axes.set_axis_off()
    figure.savefig(output, dpi=150)


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 1.0, height: float = 0.6) -> None:
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, "round,pad=0,rounding_size=0.12", fc=colour, ec=INK, lw=0.8))
    axes.text(x, y, text, ha="center", va="center", color=INK, fontsize=10)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK, bend: float = 0.0
) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 10, "connectionstyle": f"arc3,rad={bend}", "zorder": 3}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, **style))


def draw_network(axes: Axes) -> None:
    """The planned U-Net; its last decoder stage reads from every stage computed before."""
    encoder = [(0.0, -1.2 * i) for i in range(STAGES)]
    decoder = [(5.0, -1.2 * (STAGES - 2 - d)) for d in range(STAGES - 1)]
    x, y = 3.0, 0.0
    box(axes, x, y, r"$\Sigma\, a_k v_k$", "white")
    for i, (left, level) in enumerate(encoder):
        box(axes, left, level, f"$E_{i}$", ENCODER)
        arrow(axes, (left + 0.5, level), (x - 0.5, y + 0.2 - 0.14 * i), ENCODER, bend=0.06 * i)
        if i:
            arrow(axes, (left, level + 0.9), (left, level + 0.3))
    for d, (right, level) in enumerate(decoder):
        box(axes, right, level, f"$D_{d}$", DECODER)
        if d < len(decoder) - 1:
            arrow(axes, (right - 0.5, level), (x - 0.1 + 0.25 * d, y - 0.3), DECODER, bend=-0.2)
        if d < len(decoder) - 2:
            arrow(axes, (right, level + 0.3), (right, level + 0.9))
    arrow(axes, (0.5, encoder[-1][1]), (5.0, decoder[0][1] - 0.3), bend=0.25)
    arrow(axes, (4.7, decoder[-2][1] + 0.3), (x + 0.5, y - 0.2), CURRENT, bend=0.1)
    axes.text(4.35, -0.62, "$x$", color=INK, fontsize=10)
    arrow(axes, (x + 0.5, y), (4.5, y), CURRENT)
    axes.text(2.5, 0.75, "a stage reads from the history pool", ha="center", fontsize=10)
    axes.set(xlim=(-0.7, 5.7), ylim=(-4.3, 1.1))


def draw_reading(axes: Axes) -> None:
    """What happens between the pool and the stage."""
    rows = [
        (0.0, "$h_0$", "finer: average, then project", ENCODER),
        (-0.9, "$h_1$", "same size: project", ENCODER),
        (-1.8, "$h_2$", "coarser: project, then upsample", ENCODER),
        (-2.7, "$x$", "the stage's own input, as it is", CURRENT),
    ]
    for k, (y, source, how, colour) in enumerate(rows):
        box(axes, 0, y, source, colour, width=0.7)
        arrow(axes, (0.35, y), (4.4, y))
        axes.text(2.35, y + 0.08, how, ha="center", va="bottom", fontsize=8)
        box(axes, 4.75, y, f"$v_{source.strip('$')[-1]}$", "white", width=0.7)
        arrow(axes, (5.1, y), (6.2, -1.35 + 0.2 * (1.5 - k)))
    weights = "$a_k(p)=$ softmax over $k$ of\n$\\langle w,\\ \\mathrm{RMSNorm}(v_k(p))\\rangle$"
    box(axes, 8.0, -1.35, weights, "white", width=3.6, height=1.0)
    arrow(axes, (9.8, -1.35), (10.6, -1.35), CURRENT)
    axes.text(10.7, -1.35, r"$\sum_k a_k(p)\,v_k(p)$", va="center", fontsize=11)
    query = "$w$: the stage's pseudo-query,\nzero at the start of training"
    axes.text(8.0, -2.0, query, ha="center", va="top", fontsize=8)
    axes.text(5.6, 0.75, "aligned candidates, mixed position by position", ha="center", fontsize=10)
    axes.set(xlim=(-0.5, 13.0), ylim=(-3.2, 1.1))


if __name__ == "__main__":
    main(sys.argv[1])
