"""Grouped bar chart: models side by side over several measures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tinyllava_switchkd.visualize.curves import STYLE, save_figure
from tinyllava_switchkd.visualize.radar import COLOURS, INK


def draw_bars(
    models: Mapping[str, Mapping[str, float]],
    path: str | Path,
    spread: Mapping[str, Mapping[str, float]] | None = None,
    titles: Mapping[str, str] | None = None,
    note: str = "",
) -> Path:
    """Draw one group of bars per measure, with one bar per model and its value on top.

    Args:
        models: label -> measure -> value on 0-100; at most seven models. The first model's measures are the groups.
        path: file to write.
        spread: label -> measure -> half length of an error bar (a standard deviation).
        titles: measure -> label of its group.
        note: a line below the chart.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    measures = list(next(iter(models.values())))
    width = 0.8 / len(models)
    with rc_context(STYLE):
        figure = Figure(figsize=(max(5.0, 1.25 * len(measures) + 1.2), 3.5), layout="constrained")
        axis = figure.add_subplot()
        for order, (label, values) in enumerate(models.items()):
            at = [group + (order - (len(models) - 1) / 2) * width for group in range(len(measures))]
            errors = None if not spread or label not in spread else [spread[label].get(m, 0.0) for m in measures]
            heights = [values[measure] for measure in measures]
            axis.bar(
                at,
                heights,
                0.92 * width,
                color=COLOURS[order],
                label=label,
                yerr=errors,
                error_kw={"ecolor": INK, "elinewidth": 0.8, "capsize": 1.5},
            )
            for number, (x, height) in enumerate(zip(at, heights, strict=True)):
                top = height + (errors[number] if errors else 0.0)
                axis.text(x, top + 0.8, f"{height:.0f}", ha="center", va="bottom", fontsize=6.5, color="#555555")
        axis.set_xticks(range(len(measures)), [(titles or {}).get(measure, measure) for measure in measures])
        axis.tick_params(axis="x", length=0, labelcolor=INK)
        axis.set(ylabel="accuracy (%)", ylim=(0, 108), yticks=range(0, 101, 20), xlim=(-0.55, len(measures) - 0.45))
        axis.set_axisbelow(True)
        axis.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=len(models), columnspacing=1.4, handlelength=1.1)
        if note:
            axis.set_xlabel(note, color="#666666", fontsize=8, loc="left", labelpad=8)
        return save_figure(figure, path)
