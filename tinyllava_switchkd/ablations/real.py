"""Switch-KD on real pretrained weights: ``python -m tinyllava_switchkd.ablations real``, scripts/train/real_weights.sh.

A teacher, and students trained with and without it on the same pictures, by the quickstart's experiment: the same
training and evaluation entry points, and what is finished is used again. Beside scores of held-out pictures it measures
what the terms of the loss are to one another before, in the middle of and after training. `real_parts` makes models and
pictures, `real_runs` trains and measures; here are the plan, the command and the tables.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from tinyllava_switchkd import cli
from tinyllava_switchkd.eval.statistics import mean_interval
from tinyllava_switchkd.io import JsonObject, read_json, write_json

from .tables import WAYS

RESULTS = "real_weights.json"

HUB = {
    "teacher": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "student": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "tower": "google/siglip-base-patch16-224",
}
"""Models by name, where the hub is reached."""

MEASURES = {
    "caption_loss": "caption, loss a token",
    "caption_words": "caption, F1 of words",
    "kind": "kind, TextVQA's form",
    "there": "yes/no, POPE's form",
}
"""What is measured of every held-out picture. The first is better when smaller; the rest are per cent."""


OTHERS = ("align", "fkl", "rkl", "logit_kd", "llava_kd", "align_kd")
"""Further ways of the tables that these models can go."""


class OutOfTimeError(RuntimeError):
    """The minutes are used up."""


@dataclass(frozen=True)
class Plan:
    """Steps of each stage, and what else decides the numbers.

    Attributes:
        student_layers: how many of the language model's layers a student keeps; None for all.
        held_out: held-out pictures of every kind.
        turns: of a training sample, at most.
        converge: steps are the most that are made; validation ends a stage.
    """

    teacher_pt_steps: int = 24
    teacher_steps: int = 48
    student_pt_steps: int = 24
    student_steps: int = 48
    adapt_steps: int = 12
    batch_size: int = 4
    image_size: int = 84
    student_layers: int | None = 11
    held_out: int = 8
    turns: int = 2
    converge: bool = False

    @classmethod
    def within(cls, minutes: float, seeds: int) -> Plan:
        """As many steps as `minutes` of one core bear, what does not depend on steps counted first."""
        whole = cls()
        steps, rest = whole.seconds(seeds)
        factor = (60 * minutes - rest) / steps
        names = [field.name for field in dataclasses.fields(cls) if field.name.endswith("steps")]
        return dataclasses.replace(whole, **{name: max(2, round(factor * getattr(whole, name))) for name in names})

    def seconds(self, seeds: int) -> tuple[float, float]:
        """Seconds of one core that all steps take about, and all the rest, by `SECONDS`."""
        steps = self.teacher_pt_steps * SECONDS["teacher_pt"]
        steps += (self.teacher_steps + self.adapt_steps) * SECONDS["teacher"]
        steps += seeds * self.student_pt_steps * SECONDS["student_pt"]
        steps += seeds * self.student_steps * (SECONDS["sft"] + SECONDS["switch_kd"])
        return steps, 2 * seeds * SECONDS["scores"] + SECONDS["teacher_scores"] + 9 * SECONDS["terms"]


SECONDS = {
    "teacher_pt": 2.0,
    "teacher": 5.0,
    "student_pt": 1.1,
    "sft": 2.9,
    "switch_kd": 6.5,
    "scores": 60.0,
    "teacher_scores": 120.0,
    "terms": 40.0,
}
"""Seconds of one core: of a step of four pictures, of scoring a checkpoint, of comparing terms at one temperature."""

UNTIL_CONVERGED = Plan(
    *(400, 2000, 400, 2000, 400),
    batch_size=16,
    image_size=224,
    student_layers=None,
    held_out=12,
    turns=4,
    converge=True,
)
"""Where there is a GPU."""


# What is printed


def of_pictures(stored: JsonObject, key: str, measure: str) -> list[float]:
    """One measure of a way (or of the teacher), a value a held-out picture: the mean over seeds; [] without runs."""
    runs = [run for name, run in stored["runs"].items() if name.partition("/")[0] == key]
    return [fmean(values) for values in zip(*(run[measure] for run in runs), strict=True)]


def ways_of(stored: JsonObject) -> list[str]:
    return list(dict.fromkeys(name.partition("/")[0] for name in stored["runs"]))


def seeds_of(stored: JsonObject, key: str) -> int:
    return sum(name.partition("/")[0] == key for name in stored["runs"])


def label(key: str) -> str:
    return WAYS[key].label if key in WAYS else key


def lines(stored: JsonObject) -> list[list[str]]:
    """Cells of the table of scores, the heads first."""
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
    """Cells of what the terms are to one another, a row a state, at tau 3."""
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
    """Cells of the states that were measured at several temperatures."""
    rows = [["", "tau", *CELLS]]
    for name, state in stored["states"].items():
        for tau, at in state["temperatures"].items() if len(state["temperatures"]) > 1 else ():
            rows.append([name, tau, *_cells(at)])
    return rows


def _cells(at: JsonObject) -> list[str]:
    """What the terms are to one another at one temperature: means, gradients, cosine, and the top tokens' share."""
    means, norms = (", ".join(f"{value:.3g}" for value in at[part].values()) for part in ("means", "norms"))
    cosine = "–" if at["cosine"] is None else f"{at['cosine']:+.2f}"
    return [means, norms, cosine, f"{100 * at['top_1']:.1f} % / {100 * at['top_100']:.0f} %"]


def history_lines(stored: JsonObject, key: str = "switch_kd/1", most: int = 8) -> list[list[str]]:
    """Cells of what a run logged on its training batches, evenly spread steps of it."""
    history = stored["runs"].get(key, stored.get("unfinished", {}).get(key, {})).get("history", [])
    rows = [["step", "ce", "align", "switch", "k, teacher leads", "k, student leads", "overlap"]]
    count = min(most, len(history))
    for line in [history[round(at * (len(history) - 1) / max(count - 1, 1))] for at in range(count)]:
        terms = [f"{line[name]:.3g}" for name in ("ce", "align", "visual_switch")]
        knees = [f"{line[name]:,.0f}" for name in ("knee_teacher", "knee_student")]
        rows.append([f"{line['step']:g}", *terms, *knees, f"{line['topk_overlap']:.2f}"])
    return rows


def one_line(state: JsonObject) -> str:
    at = state["temperatures"]["3"]
    means, norms = (", ".join(f"{name} {value:.3g}" for name, value in at[part].items()) for part in ("means", "norms"))
    return f"overlap {state['overlap']:.2f}; means {means}; gradients at the tower {norms}"


def text_of(stored: JsonObject) -> str:
    """Everything that is stored, as tables of text."""
    tables = [lines(stored), differences(stored), state_lines(stored), temperature_lines(stored)]
    tables.append(history_lines(stored))
    return "\n\n".join("\n".join(cli.table(table, len(table[0]))) for table in tables if len(table) > 1)


# The command


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = cli.CommandParser(prog="real_weights", description="Switch-KD beside SFT on real pretrained weights.")
    parser.add_argument(
        "--minutes",
        type=float,
        default=60.0,
        help="of one core; decides the steps of the first call, without a GPU (%(default)g)",
    )
    parser.add_argument("--seeds", type=int, help="students of each way (default: 5 with a GPU, else 1)")
    parser.add_argument("--output", type=Path, default=Path("playground/real_weights"), help="folder (%(default)s)")
    parser.add_argument(
        "--ways",
        nargs="+",
        default=["sft", "switch_kd"],
        metavar="WAY",
        help="rows (%(default)s); also " + ", ".join(OTHERS),
    )
    parser.add_argument(
        "--models",
        choices=("packages", "hub"),
        help="where models come from (default: the hub with a GPU, if it is reached)",
    )
    parser.add_argument("--packages", type=Path, help="folder of the packages' files (default: OUTPUT/packages)")
    args = parser.parse_args(argv)
    for way in args.ways:
        if way not in ("sft", "switch_kd", *OTHERS):
            parser.error(f"--ways has {way!r}; it takes sft, switch_kd, {', '.join(OTHERS)}.")
    if args.minutes <= 0 or (args.seeds is not None and args.seeds < 1):
        parser.error(f"--minutes {args.minutes:g} and --seeds {args.seeds} must be above 0.")
    import torch

    from tinyllava_switchkd.quickstart.experiment import prepare_environment, told

    from . import real_runs

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
            print(f"The {args.minutes:g} minutes are used up before: {missing}. The same command goes on from here.")
        print(text_of(experiment.stored))

    return told("real_weights", run)


def plan_of(root: Path, wanted: Plan, hub: bool) -> Plan:
    """The plan that a folder began with, else `wanted`: a second call must not change what the first has trained."""
    file = root / "plan.json"
    if not file.is_file():
        wanted = dataclasses.replace(wanted, student_layers=None) if hub else wanted
        write_json(file, dataclasses.asdict(wanted))
    return Plan(**read_json(file))
