"""Switch-KD on real pretrained weights: ``python -m tinyllava_switchkd.ablations real``, scripts/train/real_weights.sh.

It trains a teacher, and students with and without it on the same pictures, with the quickstart's `Experiment`: the same
entry points, and finished runs are reused. It scores the models on held-out pictures, and compares the terms of the
loss before, in the middle of and after training. `real_plan` sets the amount of training, `real_sources` makes models
and pictures, `real_runs` trains and measures; the command and the tables are here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from tinyllava_switchkd import cli
from tinyllava_switchkd.ablations.real_plan import UNTIL_CONVERGED, OutOfTimeError, Plan, plan_of
from tinyllava_switchkd.ablations.tables import WAYS
from tinyllava_switchkd.io import JsonObject
from tinyllava_switchkd.statistics import mean_interval

MEASURES = {
    "caption_loss": "caption, loss per token",
    "caption_words": "caption, F1 of words",
    "kind": "kind, TextVQA's form",
    "there": "yes/no, POPE's form",
}
"""Measures of every held-out picture. The first is better when smaller; the others are per cent."""

OTHERS = ("align", "fkl", "rkl", "logit_kd", "llava_kd", "align_kd")
"""Other ways of training in `tables` that these models support."""


# Tables


def of_pictures(stored: JsonObject, key: str, measure: str) -> list[float]:
    """One measure of a way (or of the teacher) per held-out picture, averaged over seeds; [] without runs."""
    runs = [run for name, run in stored["runs"].items() if name.partition("/")[0] == key]
    return [fmean(values) for values in zip(*(run[measure] for run in runs), strict=True)]


def ways_of(stored: JsonObject) -> list[str]:
    return list(dict.fromkeys(name.partition("/")[0] for name in stored["runs"]))


def seeds_of(stored: JsonObject, key: str) -> int:
    return sum(name.partition("/")[0] == key for name in stored["runs"])


def label(key: str) -> str:
    return WAYS[key].label if key in WAYS else key


def lines(stored: JsonObject) -> list[list[str]]:
    """Cells of the table of scores, header first."""
    rows = [["", "seeds", *MEASURES.values(), "training loss, first and last", "seconds"]]
    for key in ways_of(stored):
        runs = [run for name, run in stored["runs"].items() if name.partition("/")[0] == key]
        cells = [_interval(of_pictures(stored, key, name), name) for name in MEASURES]
        losses = f"{fmean(run['first_loss'] for run in runs):.2f}, {fmean(run['last_loss'] for run in runs):.2f}"
        rows.append([label(key), str(len(runs)), *cells, losses, f"{fmean(run['seconds'] for run in runs):.0f}"])
    return rows


def differences(stored: JsonObject, reference: str = "sft") -> list[list[str]]:
    """Cells of each way minus SFT, picture by picture."""
    rows = [["minus SFT", *MEASURES.values()]]
    for key in ways_of(stored):
        if key not in (reference, "teacher") and of_pictures(stored, reference, "there"):
            pairs = ((of_pictures(stored, key, name), of_pictures(stored, reference, name)) for name in MEASURES)
            cells = [
                _interval([x - y for x, y in zip(a, b, strict=True)], name, "+")
                for (a, b), name in zip(pairs, MEASURES, strict=True)
            ]
            rows.append([label(key), *cells])
    return rows


def _interval(values: Sequence[float], measure: str, sign: str = "") -> str:
    digits = 2 if measure == "caption_loss" else 1
    return "{:{s}.{d}f} [{:{s}.{d}f}, {:{s}.{d}f}]".format(*mean_interval(values), s=sign, d=digits)


CELLS = ("ce, align, switch", "gradients at the tower", "cosine switch, CE", "top 1 / top 100 in the pairs")


def state_lines(stored: JsonObject) -> list[list[str]]:
    """Cells of the comparison of terms at tau 3, one row per state."""
    rows = [["", "k, teacher leads (5, 50, 95 %)", "k, student leads", "overlap", *CELLS]]
    for name, state in stored["states"].items():
        at = state["temperatures"]["3"]
        rows.append(
            [
                name,
                *(" / ".join(f"{k:,}" for k in state[side]) for side in ("knee_teacher", "knee_student")),
                f"{state['overlap']:.2f}",
                *_cells(at),
            ]
        )
    return rows


def temperature_lines(stored: JsonObject) -> list[list[str]]:
    """Cells of the comparison of terms, for states that were measured at several temperatures."""
    rows = [["", "tau", *CELLS]]
    for name, state in stored["states"].items():
        for tau, at in state["temperatures"].items() if len(state["temperatures"]) > 1 else ():
            rows.append([name, tau, *_cells(at)])
    return rows


def _cells(at: JsonObject) -> list[str]:
    """The terms at one temperature: means, gradient norms, cosine, and the share of the top tokens."""
    means, norms = (", ".join(f"{value:.3g}" for value in at[part].values()) for part in ("means", "norms"))
    cosine = "–" if at["cosine"] is None else f"{at['cosine']:+.2f}"
    return [means, norms, cosine, f"{100 * at['top_1']:.1f} % / {100 * at['top_100']:.0f} %"]


def history_lines(stored: JsonObject) -> list[list[str]]:
    """Cells of the log of Switch-KD's first seed on training batches, at up to eight evenly spread steps."""
    key = "switch_kd/1"
    history = stored["runs"].get(key, stored.get("unfinished", {}).get(key, {})).get("history", [])
    rows = [["step", "ce", "align", "switch", "k, teacher leads", "k, student leads", "overlap"]]
    count = min(8, len(history))
    for line in [history[round(at * (len(history) - 1) / max(count - 1, 1))] for at in range(count)]:
        terms = [f"{line[name]:.3g}" for name in ("ce", "align", "visual_switch")]
        knees = [f"{line[name]:,.0f}" for name in ("knee_teacher", "knee_student")]
        rows.append([f"{line['step']:g}", *terms, *knees, f"{line['topk_overlap']:.2f}"])
    return rows


def text_of(stored: JsonObject) -> str:
    """All stored results as text tables."""
    tables = [lines(stored), differences(stored), state_lines(stored), temperature_lines(stored)]
    tables.append(history_lines(stored))
    return "\n\n".join("\n".join(cli.table(table, len(table[0]))) for table in tables if len(table) > 1)


# The command


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.CommandParser(prog="real_weights", description="Compare Switch-KD and SFT on real pretrained weights.")
    parser.add_argument(
        "--minutes",
        type=float,
        default=60.0,
        help="time limit on one core, which also sets the steps of the first call; ignored with a GPU (%(default)g)",
    )
    parser.add_argument("--seeds", type=int, help="students per way of training (default: 5 with a GPU, else 1)")
    parser.add_argument(
        "--output", type=Path, default=Path("playground/real_weights"), help="output folder (%(default)s)"
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        default=["sft", "switch_kd"],
        metavar="WAY",
        help="ways of training (%(default)s); others are " + ", ".join(OTHERS),
    )
    parser.add_argument(
        "--models",
        choices=("packages", "hub"),
        help="source of the models (default: hub if there is a GPU and the hub is reachable, else packages)",
    )
    parser.add_argument("--packages", type=Path, help="folder of the package files (default: OUTPUT/packages)")
    args = parser.parse_args(argv)
    for way in args.ways:
        if way not in ("sft", "switch_kd", *OTHERS):
            parser.error(f"--ways has {way!r}; choose from sft, switch_kd, {', '.join(OTHERS)}.")
    if args.minutes <= 0 or (args.seeds is not None and args.seeds < 1):
        parser.error(f"--minutes {args.minutes:g} and --seeds {args.seeds} must be above 0.")
    import torch

    from tinyllava_switchkd.ablations import real_runs
    from tinyllava_switchkd.quickstart.experiment import prepare_environment, told

    prepare_environment()
    gpu = torch.cuda.is_available()
    seeds = args.seeds or (5 if gpu else 1)
    until = float("inf") if gpu else time.monotonic() + 60 * args.minutes
    root = args.output.expanduser().resolve()
    hub = args.models == "hub" or (args.models is None and gpu and real_runs.hub_is_reached())

    def run() -> None:
        plan = plan_of(root, UNTIL_CONVERGED if gpu else Plan.within(args.minutes, seeds), hub)
        packages = (args.packages or root / "packages").expanduser().resolve()
        models, pictures = real_runs.prepare(root, plan, packages, hub)
        experiment = real_runs.Real(root, plan, models, pictures, until, "cuda" if gpu else "cpu")
        try:
            real_runs.run_all(experiment, [WAYS[way] for way in args.ways], range(1, seeds + 1))
        except OutOfTimeError as missing:
            print(f"The {args.minutes:g} minutes are used up before: {missing}. Run the command again to continue.")
        print(text_of(experiment.stored))

    return told("real_weights", run)
