"""The radar chart of the paper's Figure 1: five abilities, one polygon per model."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tinyllava_switchkd.visualize.paper import average, figure1_axes

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind people can tell apart. Black is reserved for text.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT = "#222222", "#c8c8c8"
RINGS = 4
"""Number of rings around the centre."""


def axis_values(
    scores: Mapping[str, float], axes: Mapping[str, Sequence[str]] | None = None
) -> dict[str, float | None]:
    """The mean of each axis's columns; None if one of them has no score.

    Args:
        scores: column of the paper's tables -> score on 0-100.
        axes: title -> columns; Figure 1's by default.
    """
    axes = figure1_axes() if axes is None else axes
    return {title: average(scores, columns) for title, columns in axes.items()}


def common_axes(models: Iterable[Mapping[str, float]]) -> dict[str, tuple[str, ...]]:
    """Figure 1's axes, restricted to the columns for which every model has a score."""
    models = list(models)
    cut = {
        title: tuple(column for column in columns if all(model.get(column) is not None for model in models))
        for title, columns in figure1_axes().items()
    }
    return {title: columns for title, columns in cut.items() if columns}


def absences(
    models: Mapping[str, Mapping[str, float]], reasons: Mapping[tuple[str, str], str] | None = None
) -> list[str]:
    """One sentence for each axis of Figure 1 that is missing or lacks a column, with the reason.

    Args:
        models: label -> scores by column.
        reasons: (label, column) -> why there is no score; default: "no score".
    """
    sentences = []
    for title, columns in figure1_axes().items():
        lacking = []
        for column in columns:
            without: dict[str, list[str]] = {}
            for label, scores in models.items():
                if scores.get(column) is None:
                    without.setdefault((reasons or {}).get((label, column), "no score"), []).append(label)
            if without:
                whys = "; ".join(f"{', '.join(labels)}: {why}" for why, labels in without.items())
                lacking.append((column, f"{column} ({whys})"))
        absent, texts = {column for column, _ in lacking}, [text for _, text in lacking]
        if absent == set(columns):
            sentences.append(f"No axis {title}: {', '.join(texts)}.")
        elif absent:
            sentences.append(f"{title} without {', '.join(texts)}.")
    return sentences


def draw_radar(
    models: Mapping[str, Mapping[str, float]],
    path: str | Path,
    axes: Mapping[str, Sequence[str]] | None = None,
    formats: Sequence[str] = ("png", "svg"),
    note: str = "",
    dashed: Collection[str] = (),
    reasons: Mapping[tuple[str, str], str] | None = None,
) -> list[Path]:
    """Draw one polygon per model and write it as ``<path>.png`` and ``<path>.svg``.

    All axes share one scale that starts at 0 in the centre, so that small differences look small. The models' values
    are written beside each axis. Axes for which a model has no score are left out; a line below gives the reason.

    Args:
        models: label -> scores by column of the paper's tables.
        path: file name without extension.
        axes: title -> columns; default: Figure 1's, restricted to columns that all models have.
        formats: file extensions supported by matplotlib.
        note: a line below the legend.
        dashed: labels drawn with a dashed line (numbers from elsewhere).
        reasons: (label, column) -> why a score is missing, see `absences`.

    Returns:
        the files.

    Raises:
        ValueError: there is no model, there are more models than colours, or fewer than three common axes.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not models or len(models) > len(COLOURS):
        raise ValueError(f"A radar chart shows one to {len(COLOURS)} models, not {len(models)}.")
    absent = [] if axes is not None else absences(models, reasons)
    axes = common_axes(models.values()) if axes is None else axes
    if len(axes) < 3:
        raise ValueError(
            f"A radar chart needs three axes that every model has, and there {'is' if len(axes) == 1 else 'are'} "
            f"{len(axes)} ({', '.join(axes) or 'none'}); score more benchmarks. {' '.join(absent)}".strip()
        )
    values: dict[str, list[float]] = {label: [] for label in models}
    for label, scores in models.items():
        for title, value in axis_values(scores, axes).items():
            if value is None:
                raise ValueError(f"{label} has no score for the axis {title!r}.")
            values[label].append(value)
    top = scale_end([value for row in values.values() for value in row])

    style = {
        "font.family": "sans-serif",
        "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
        "font.size": 9,
        "svg.hashsalt": "radar",  # makes the SVG file reproducible
        "axes.unicode_minus": False,
    }
    with rc_context(style):
        figure = Figure(figsize=(7.0, 5.6))
        axis = figure.add_subplot()
        lowest = min(_point(number, len(axes), 1)[1] for number in range(len(axes)))
        axis.set(aspect="equal", xlim=(-1.02, 1.02), ylim=(lowest - 0.05, 1.05))
        axis.axis("off")
        _draw_grid(axis, len(axes), top)
        _draw_models(axis, values, top, dashed)
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
        lines = [line for text in (note, *absent) if text for line in textwrap.wrap(text, 120)]
        if lines:
            below -= 0.1 + 0.1 * math.ceil(len(models) / columns)
            axis.text(0.0, below, "\n".join(lines), ha="center", va="top", fontsize=7.5, color="#666666")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        files = [path.with_name(f"{path.name}.{ending}") for ending in formats]
        for file in files:
            metadata = {"Date": None} if file.suffix == ".svg" else None
            figure.savefig(file, dpi=300, bbox_inches="tight", pad_inches=0.08, facecolor="white", metadata=metadata)
    return files


def scale_end(values: Sequence[float]) -> float:
    """The value at the outer ring: all rings are whole numbers, and no value lies outside.

    Raises:
        ValueError: a value is not on 0-100.
    """
    low, high = min(values), max(values)
    if low < 0 or high > 100:
        raise ValueError(f"The values of an axis must lie on 0-100, not {low:g} to {high:g}.")
    return float(next(RINGS * step for step in (1, 2, 5, 10, 15, 20, 25) if RINGS * step >= high))


def _point(number: int, count: int, radius: float) -> tuple[float, float]:
    """Coordinates on axis `number` of `count`, clockwise from the top."""
    angle = math.pi / 2 - 2 * math.pi * number / count
    return radius * math.cos(angle), radius * math.sin(angle)


def _draw_grid(axis: Axes, count: int, top: float) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=1.8, foreground="white")]
    write = partial(axis.text, color="#777777", fontsize=7, ha="center", va="center", zorder=20, path_effects=halo)
    for ring in range(1, RINGS + 1):
        corners = [_point(number, count, ring / RINGS) for number in range(count)]
        outer = ring == RINGS
        axis.fill(
            *zip(*corners, strict=True),
            facecolor="#fafafa" if outer else "none",
            edgecolor="#9a9a9a" if outer else FAINT,
            linewidth=0.9 if outer else 0.7,
            zorder=0 if outer else 1,
        )
        # Beside the first axis, on its clockwise side, so that it does not cover the polygons' corners.
        write(0.05, ring / RINGS, f"{ring / RINGS * top:g}")
    write(0.05, 0.0, "0")
    for number in range(count):
        axis.plot(*zip((0, 0), _point(number, count, 1), strict=True), color=FAINT, linewidth=0.7, zorder=1)


def _draw_models(axis: Axes, values: Mapping[str, Sequence[float]], top: float, dashed: Collection[str]) -> None:
    for order, (label, row) in enumerate(values.items()):
        corners = [_point(number, len(row), value / top) for number, value in enumerate(row)]
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
    """Write at the end of every axis its title, its columns, and the models' values in their colours."""
    from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea, VPacker

    for number, (title, columns) in enumerate(axes.items()):
        lines: list[Artist] = [TextArea(title, textprops={"color": INK, "fontsize": 10.5, "fontweight": "bold"})]
        if list(columns) != [title]:
            lines.append(TextArea(", ".join(columns), textprops={"color": "#666666", "fontsize": 8}))
        figures: list[Artist] = [
            TextArea(f"{row[number]:.1f}", textprops={"color": COLOURS[order], "fontsize": 8.5, "fontweight": "bold"})
            for order, row in enumerate(rows)
        ]
        lines.append(HPacker(children=figures, pad=0, sep=7))
        x, y = _point(number, len(axes), 1.05 if number == 0 else 1.11)  # the first axis has its values beside it
        vertical = 0.0 if y > 0.9 else 1.0 if y < -0.7 else 0.5
        is_centred = abs(x) < 0.2 or vertical == 1.0  # below a corner there is room on both sides
        side = 0.5 if is_centred else 0.0 if x > 0 else 1.0
        align: Literal["left", "center", "right"] = "center" if is_centred else "left" if x > 0 else "right"
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
