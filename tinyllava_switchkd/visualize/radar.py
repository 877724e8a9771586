"""The radar chart of the paper's Figure 1: five abilities, one polygon a model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .paper import figure1_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which people with colour-blindness tell apart; black ink stays for the text.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT = "#222222", "#c8c8c8"
RINGS = 4
INNER = 0.25
"""Radius of the innermost ring: an axis's lowest value must not vanish in the centre."""


def axis_values(
    scores: Mapping[str, float], axes: Mapping[str, Sequence[str]] | None = None
) -> dict[str, float | None]:
    """Mean of each axis's columns; None for an axis that lacks one.

    Args:
        scores: column of the paper's tables -> score on 0-100.
        axes: title -> columns; Figure 1's by default.
    """
    return {
        title: None
        if any(scores.get(column) is None for column in columns)
        else sum(scores[column] for column in columns) / len(columns)
        for title, columns in (figure1_axes() if axes is None else axes).items()
    }


def common_axes(models: Iterable[Mapping[str, float]]) -> dict[str, tuple[str, ...]]:
    """Figure 1's axes, cut down to the columns that every model has a score for."""
    models = list(models)
    cut = {
        title: tuple(column for column in columns if all(model.get(column) is not None for model in models))
        for title, columns in figure1_axes().items()
    }
    return {title: columns for title, columns in cut.items() if columns}


def draw_radar(
    models: Mapping[str, Mapping[str, float]],
    path: str | Path,
    axes: Mapping[str, Sequence[str]] | None = None,
    formats: Sequence[str] = ("png", "svg"),
    note: str = "",
    dashed: Collection[str] = (),
) -> list[Path]:
    """Draw one polygon a model and write it as ``<path>.png`` and ``<path>.svg``.

    Every axis has its own scale, whose ends are written on it: the abilities lie tens of points apart, the models
    only a few. A model that stands alone is shown on one scale from 0, for there is nothing to compare it with.

    Args:
        models: label -> scores by column of the paper's tables.
        path: file name without its ending.
        axes: title -> columns; by default Figure 1's, as far as all models have their columns.
        formats: endings that matplotlib knows.
        note: a line below the legend.
        dashed: labels drawn with a broken line (numbers from elsewhere).

    Returns:
        the files.

    Raises:
        ValueError: no model, too many to tell apart, or fewer than three axes that all models have.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not models or len(models) > len(COLOURS):
        raise ValueError(f"A radar chart shows one to {len(COLOURS)} models, not {len(models)}.")
    axes = common_axes(models.values()) if axes is None else axes
    if len(axes) < 3:
        raise ValueError(
            f"A radar chart needs three axes that every model has, and there {'is' if len(axes) == 1 else 'are'} "
            f"{len(axes)} ({', '.join(axes) or 'none'}); score more benchmarks."
        )
    values = {label: list(axis_values(scores, axes).values()) for label, scores in models.items()}
    for label, row in values.items():
        if None in row:
            raise ValueError(f"{label} has no score for the axis {list(axes)[row.index(None)]!r}.")
    scales = axis_scales(list(values.values()))

    style = {
        "font.family": "sans-serif",
        "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
        "font.size": 9,
        "svg.hashsalt": "radar",  # the same chart gives the same file
        "axes.unicode_minus": False,
    }
    with rc_context(style):
        figure = Figure(figsize=(7.0, 5.6))
        axis = figure.add_subplot()
        lowest = min(_point(number, len(axes), 1)[1] for number in range(len(axes)))
        axis.set(aspect="equal", xlim=(-1.02, 1.02), ylim=(lowest - 0.05, 1.05))
        axis.axis("off")
        _draw_grid(axis, scales)
        _draw_models(axis, values, scales, dashed)
        _draw_titles(axis, axes, list(values.values()))
        columns = len(models) if sum(map(len, models)) < 80 else 2
        below = 1.11 * lowest - 0.28  # under the titles of the lowest axes
        axis.legend(
            loc="upper center",
            bbox_to_anchor=(0.0, below),
            bbox_transform=axis.transData,
            ncols=columns,
            frameon=False,
            handlelength=2.2,
            columnspacing=2.0,
            fontsize=9.5,
        )
        if note:
            below -= 0.1 + 0.1 * math.ceil(len(models) / columns)
            axis.text(0.0, below, note, ha="center", va="top", fontsize=7.5, color="#666666")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        files = [path.with_name(f"{path.name}.{ending}") for ending in formats]
        for file in files:
            metadata = {"Date": None} if file.suffix == ".svg" else None
            figure.savefig(file, dpi=300, bbox_inches="tight", pad_inches=0.08, facecolor="white", metadata=metadata)
    return files


def axis_scales(rows: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """A scale for each axis; one from 0 for all of them if there is but one model."""
    if len(rows) == 1:
        return [axis_scale([0.0, *rows[0]])] * len(rows[0])
    return [axis_scale(column) for column in zip(*rows, strict=True)]


def axis_scale(values: Sequence[float]) -> tuple[float, float]:
    """Round ends of an axis that hold the values, if possible with room below the lowest and none above 100."""
    low, high = min(values), max(values)
    for step in (1, 2, 5, 10, 15, 20, 25, 30, 35):
        for bottom in (low - 0.125 * (high - low), low):
            start = step * math.floor(max(bottom, 0.0) / step)
            if start + step * (RINGS - 1) >= high:
                start = min(start, max(0, 100 - step * (RINGS - 1)))
                return float(start), float(start + step * (RINGS - 1))
    raise ValueError(f"The values of an axis are not on 0-100: {low:g} to {high:g}.")


def _radius(value: float, scale: tuple[float, float]) -> float:
    low, high = scale
    return INNER + (1 - INNER) * (value - low) / (high - low)


def _point(number: int, count: int, radius: float) -> tuple[float, float]:
    """Axis `number` of `count`, clockwise from the top."""
    angle = math.pi / 2 - 2 * math.pi * number / count
    return radius * math.cos(angle), radius * math.sin(angle)


def _draw_grid(axis: Axes, scales: Sequence[tuple[float, float]]) -> None:
    from matplotlib.patheffects import withStroke

    count = len(scales)
    for ring in range(RINGS):
        corners = [_point(number, count, INNER + (1 - INNER) * ring / (RINGS - 1)) for number in range(count)]
        outer = ring == RINGS - 1
        axis.fill(
            *zip(*corners, strict=True),
            facecolor="#fafafa" if outer else "none",
            edgecolor="#9a9a9a" if outer else FAINT,
            linewidth=0.9 if outer else 0.7,
            zorder=0 if outer else 1,
        )
    for number, scale in enumerate(scales):
        axis.plot(*zip((0, 0), _point(number, count, 1), strict=True), color=FAINT, linewidth=0.7, zorder=1)
        for ring in range(RINGS):
            share = ring / (RINGS - 1)
            x, y = _point(number, count, INNER + (1 - INNER) * share)
            # Beside the axis, on its clockwise side, so that the polygons' corners stay free.
            across = -2 * math.pi * number / count
            axis.text(
                x + 0.05 * math.cos(across),
                y + 0.05 * math.sin(across),
                f"{scale[0] + share * (scale[1] - scale[0]):g}",
                color="#777777",
                fontsize=7,
                ha="center",
                va="center",
                zorder=20,
                path_effects=[withStroke(linewidth=1.8, foreground="white")],
            )


def _draw_models(
    axis: Axes,
    values: Mapping[str, Sequence[float]],
    scales: Sequence[tuple[float, float]],
    dashed: Collection[str],
) -> None:
    for order, (label, row) in enumerate(values.items()):
        corners = [_point(number, len(row), _radius(value, scales[number])) for number, value in enumerate(row)]
        xs, ys = zip(*corners, corners[0], strict=True)
        axis.fill(xs, ys, color=COLOURS[order], alpha=0.08, linewidth=0, zorder=3)
        axis.plot(
            xs,
            ys,
            color=COLOURS[order],
            linewidth=1.8,
            linestyle=(0, (4, 1.6)) if label in dashed else "-",
            marker=MARKERS[order],
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.7,
            label=label,
            zorder=4 + order,
            solid_joinstyle="round",
        )


def _draw_titles(axis: Axes, axes: Mapping[str, Sequence[str]], rows: Sequence[Sequence[float]]) -> None:
    """At the end of every axis: its title, its columns, and the models' values in the models' colours."""
    from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea, VPacker

    for number, (title, columns) in enumerate(axes.items()):
        lines = [TextArea(title, textprops={"color": INK, "fontsize": 10.5, "fontweight": "bold"})]
        if list(columns) != [title]:
            lines.append(TextArea(", ".join(columns), textprops={"color": "#666666", "fontsize": 8}))
        figures = [
            TextArea(f"{row[number]:.1f}", textprops={"color": COLOURS[order], "fontsize": 8.5, "fontweight": "bold"})
            for order, row in enumerate(rows)
        ]
        lines.append(HPacker(children=figures, pad=0, sep=7))
        x, y = _point(number, len(axes), 1.05 if number == 0 else 1.11)  # the first has its figures beside it
        side = 0.5 if abs(x) < 0.2 else 0.0 if x > 0 else 1.0
        align = {0.0: "left", 0.5: "center", 1.0: "right"}[side]
        vertical = 0.0 if y > 0.9 else 1.0 if y < -0.5 else 0.5
        if vertical == 1.0:
            side = 0.5  # below a corner there is room on both sides
            align = "center"
        axis.add_artist(
            AnnotationBbox(
                VPacker(children=lines, pad=0, sep=3, align=align),
                (x, y),
                box_alignment=(side, vertical),
                frameon=False,
                pad=0,
                annotation_clip=False,
            )
        )
