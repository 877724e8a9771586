"""Curves of training runs from the trainer's log: losses, knees, overlap, gradient shares.

    python -m tinyllava_switchkd.visualize.curves RUN... --output FOLDER

draws the losses of all runs in one picture, and the other curves in one picture per run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.io import JsonObject
from tinyllava_switchkd.registry import display_names
from tinyllava_switchkd.visualize.radar import COLOURS, INK, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[JsonObject]
"""``log_history`` of a trainer_state.json: one mapping per logging step, with "step" and the logged values."""

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9a9a9a",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.unicode_minus": False,
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
}
"""matplotlib settings of the project's line and bar charts."""


def titles() -> tuple[dict[str, str], dict[str, str]]:
    """Name -> title of what the registered methods log: the terms of the loss, and the knees of the two leaders."""
    from tinyllava_switchkd.distill import KNEES, terms_of_all_methods

    return terms_of_all_methods(), KNEES


def read_history(run: str | Path) -> list[JsonObject]:
    """Read the log of a run.

    Args:
        run: a ``trainer_state.json``, or a run's output folder. If the folder has none yet, as during training, the
            newest checkpoint's is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a trainer's state.
    """
    run = file = Path(run)
    if run.is_dir():
        checkpoints = sorted(run.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
        candidates = [run / "trainer_state.json", *reversed(checkpoints)]
        file = next((candidate for candidate in candidates if candidate.is_file()), run / "trainer_state.json")
    if not file.is_file():
        raise FileNotFoundError(f"There is no {file}; give the output folder of a training run.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))["log_history"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is not the state of a training run: it has no log_history.") from None


def series(history: History, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one logged quantity; empty if it was never logged."""
    rows = [(row["step"], row[name]) for row in history if name in row and "step" in row]
    steps, values = zip(*rows, strict=True) if rows else ((), ())
    return np.asarray(steps, dtype=float), np.asarray(values, dtype=float)


def smooth(values: np.ndarray, window: int | None = None) -> np.ndarray:
    """Centred running mean; the window shrinks towards both ends, so that the first and last values do not change.

    Args:
        values: [steps].
        window: number of values; default: a fifteenth of them.
    """
    window = max(1, len(values) // 15) if window is None else window
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def draw_losses(runs: Mapping[str, History], path: str | Path) -> Path:
    """Draw the terms of the loss over the steps: one panel per term, one line per run.

    Raw values are drawn faint behind smoothed ones. Losses on held-out data are dashed, with a point per evaluation. If
    a run logged no terms (trained elsewhere), its "loss" is drawn as cross-entropy.

    Raises:
        ValueError: no run logged a loss, or there are more runs than colours.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not 1 <= len(runs) <= len(COLOURS):
        raise ValueError(f"A chart shows one to {len(COLOURS)} runs, not {len(runs)}.")
    found: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    terms, _ = titles()
    for label, history in runs.items():
        for part in terms:
            steps, values = series(history, part)
            if part == "ce" and not len(steps):
                steps, values = series(history, "loss")
            if len(steps):
                found.setdefault(part, {})[label] = (steps, values)
    if not found:
        raise ValueError("None of the runs has logged a loss.")
    with rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(found) + 0.4, 3.1), layout="constrained")
        panels = figure.subplots(1, len(found), squeeze=False)[0]
        for panel, (part, lines) in zip(panels, found.items(), strict=True):
            for order, label in enumerate(runs):
                if label in lines:
                    _line(panel, *lines[label], COLOURS[order], label)
                    held_out = series(runs[label], f"eval_{part}")
                    panel.plot(*held_out, color=COLOURS[order], linestyle="--", marker="o", markersize=2.5)
            panel.set(title=terms[part], xlabel="step", ylim=(0, _headroom([values for _, values in lines.values()])))
            panel.grid(axis="y")
        panels[0].set_ylabel("loss per answer token")
        panels[0].legend(loc="upper right")
        return save_figure(figure, path)


GRADIENT = "gradient/"
"""Prefix of logged gradient norms: gradient/PLACE/TERM."""


def draw_inside(history: History, path: str | Path, vocabulary: int | None = None, title: str = "") -> Path:
    """Draw the knees, the top-k overlap and the gradient shares of a distilled run over its steps.

    The panels are: the mean knee of both leaders; the overlap of their top-k sets; and, for each place of the student,
    each weighted term's share of the gradient. The share is the norm of the term's gradient there divided by the sum of
    all terms' norms. Quantities that were not logged are left out.

    Args:
        history: log of the run.
        path: file to write.
        vocabulary: vocabulary size, shown beside k.
        title: title of the picture.

    Raises:
        ValueError: the run logged none of these quantities.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    terms, knees = titles()
    lines = {name: found for name in knees if len((found := series(history, name))[0])}
    overlap, places = series(history, "topk_overlap"), _gradients(history)
    count = bool(lines) + bool(len(overlap[0])) + len(places)
    if not count:
        raise ValueError(
            "The run has logged no knee and no gradient; knees come from distillation with a loss that ranks logits, "
            "gradients from --log_gradient_shares N."
        )
    with rc_context(STYLE):
        columns = min(count, 3)
        rows = -(-count // columns)
        figure = Figure(figsize=(3.6 * columns + 0.4, 3.1 * rows), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel in panels[count:]:
            panel.set_axis_off()
        left = iter(panels)
        if lines:
            panel = next(left)
            for order, (name, (steps, values)) in enumerate(lines.items()):
                _line(panel, steps, values, COLOURS[order], knees[name])
            size = f" of {vocabulary:,}" if vocabulary else ""
            panel.set(title=f"logits up to the knee (mean k{size})", ylabel="k")
            panel.set_ylim(bottom=0)
            panel.legend(loc="best")
        if len(overlap[0]):
            panel = next(left)
            _line(panel, overlap[0], 100 * overlap[1], COLOURS[2], "")
            panel.set(title="overlap of the two top-k sets", ylabel="%", ylim=(0, 100))
        for number, (place, norms) in enumerate(places.items()):
            panel = next(left)
            total = np.maximum(sum(values for _, values in norms.values()), 1e-30)
            for order, (term, (steps, values)) in enumerate(norms.items()):
                colour, mark = COLOURS[order % len(COLOURS)], MARKERS[order % len(MARKERS)]
                label = terms.get(term, term)
                panel.plot(steps, 100 * values / total, color=colour, marker=mark, markersize=2.5, label=label)
            panel.set(title=f"gradient at {place.replace('_', ' ')}", ylabel="share, %", ylim=(0, 100))
            if not number:
                panel.legend(loc="best")
        for panel in panels[:count]:
            panel.set_xlabel("step")
            panel.grid(axis="y")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
        return save_figure(figure, path)


def _gradients(history: History) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Place in the student -> weighted term -> steps and norms of its gradient."""
    places: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for name in dict.fromkeys(name for row in history for name in row if name.startswith(GRADIENT)):
        _, place, term = name.split("/")
        places.setdefault(place, {})[term] = series(history, name)
    return places


def _line(panel: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    panel.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
    panel.plot(steps, smooth(values), color=colour, linewidth=1.8, label=label)


def _headroom(lines: Sequence[np.ndarray]) -> float:
    """Upper end of a loss axis; the first few values, which fall fast, may lie outside."""
    top = max(float(np.quantile(values, 0.98)) for values in lines)
    return 1.15 * top if top > 0 else 1.0


def save_figure(figure: Figure, path: str | Path, dpi: int = 200) -> Path:
    """Write a figure; creates its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, facecolor="white")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(
        prog="python -m tinyllava_switchkd.visualize.curves",
        description="Draw the losses of training runs, and the knees, overlap and gradient shares of each run.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders of training runs")
    parser.add_argument("--output", default=".", help="folder for losses.png and inside_<run>.png (default: here)")
    args = parser.parse_args(argv)
    try:
        names = display_names([str(Path(run).resolve()) for run in args.runs])
        runs = {name: read_history(run) for name, run in zip(names, args.runs, strict=True)}
        files = [draw_losses(runs, Path(args.output, "losses.png"))]
        for label, history in runs.items():
            if _gradients(history) or any(len(series(history, name)[0]) for name in titles()[1]):
                file = Path(args.output, f"inside_{label.replace('/', '_')}.png")
                files.append(draw_inside(history, file, title=label))
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    for file in files:
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
