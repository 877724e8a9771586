"""The command: ``tinyllava-switchkd`` or ``python -m tinyllava_switchkd.launch``."""

from __future__ import annotations

import difflib
import os
import runpy
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tinyllava_switchkd.cli import show
from tinyllava_switchkd.launch import evaluate, recipe, stages
from tinyllava_switchkd.launch.devices import find_devices
from tinyllava_switchkd.launch.processes import Commands, become, is_rank
from tinyllava_switchkd.launch.variables import read

MODULES = {
    "prepare": ("tinyllava_switchkd.eval.prepare", "download the benchmarks' data into LLaVA's layout"),
    "data": ("tinyllava_switchkd.data.download", "download LLaVA-558K and LLaVA-Mix-665K"),
    "check": ("tinyllava_switchkd.train.check_data", "check a data file"),
    "score": ("tinyllava_switchkd.eval.score", "score a file of answers"),
    "report": ("tinyllava_switchkd.eval.report", "write tables and charts of scores"),
    "export": ("tinyllava_switchkd.model.export", "write a checkpoint in another format"),
    "demo": ("tinyllava_switchkd.serve.app", "start the web demo"),
    "chat": ("tinyllava_switchkd.serve.chat", "talk to a checkpoint in the terminal"),
    "attention": ("tinyllava_switchkd.visualize.attention", "draw attention maps"),
    "curves": ("tinyllava_switchkd.visualize.curves", "draw training curves"),
    "quickstart": ("tinyllava_switchkd.quickstart.run", "train, distil and evaluate tiny models on a CPU"),
}
"""Command -> (module, what it does). The module parses its own options."""

SCRIPT = "TINYLLAVA_SCRIPT"
"""Environment variable with the path of the calling script, which is shown in usage and error messages."""


class UsageError(ValueError):
    """An invalid command line; the message is the usage text."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; a user's mistake is reported in one sentence."""
    words = list(sys.argv[1:] if argv is None else argv)
    script = os.environ.pop(SCRIPT, "")
    try:
        return _command(words, script)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        name = script.rsplit("/", 1)[-1] or " ".join(["tinyllava-switchkd", *words[:1]])
        print(f"{name}: {error}", file=sys.stderr)
        return 1


def _command(words: list[str], script: str) -> int:
    commands: dict[str, Callable[[list[str], str], int]] = {"train": _train, "eval": _eval, "recipes": _recipes}
    if not words or words[0] in ("-h", "--help", "help"):
        show(_overview())
        return 0 if words else 1
    if words[0] in commands:
        return commands[words[0]](words[1:], script)
    if words[0] in MODULES:
        module, _ = MODULES[words[0]]
        sys.argv = [f"tinyllava-switchkd {words[0]}", *words[1:]]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return 0
    near = difflib.get_close_matches(words[0], [*commands, *MODULES], n=1)
    hint = f"did you mean {near[0]}?" if near else "see --help."
    raise UsageError(f"tinyllava-switchkd: there is no command {words[0]!r}; {hint}")


def _overview() -> str:
    own = {
        "train": "pretrain | finetune | distill | custom ARGUMENTS, or --recipe NAME|FILE",
        "eval": "BENCHMARK|all MODEL_PATH [MODEL_NAME]",
        "recipes": "list the recipes; recipes NAME prints one to copy",
    }
    rows = own | {name: what for name, (_, what) in MODULES.items()}
    lines = [f"  {name:<11} {what}" for name, what in rows.items()]
    return "\n".join(
        [
            "Usage: tinyllava-switchkd COMMAND ...",
            "",
            *lines,
            "",
            "See COMMAND --help for details. DRY_RUN=1 shows the commands without running them.",
        ]
    )


def _python(environment: Mapping[str, str]) -> str:
    return environment.get("PYTHON") or sys.executable


def playground() -> Path:
    """The folder of data, checkpoints and results: in the repository if there is one, else in the current folder."""
    repository = Path(__file__).resolve().parents[2]
    return (repository if (repository / "scripts" / "train").is_dir() else Path.cwd()) / "playground"


def is_dry(environment: Mapping[str, str]) -> bool:
    return environment.get("DRY_RUN", "").lower() not in ("", "0", "false", "no")


def _train(words: list[str], script: str) -> int:
    stage, positional, flags = _split(words)
    if {"help", "h"} & flags.keys():
        raise UsageError(_train_usage(stage, script))
    if "recipe" in flags and not stage:
        name = flags.pop("recipe")
        if positional or not isinstance(name, str):
            raise ValueError("--recipe takes one recipe: a name or a file.")
        named = recipe.read_recipe(name)
    elif stage.removesuffix("_lora") not in stages.ARGUMENTS:
        raise UsageError(_train_usage(stage, script))
    else:
        named = None
        _check_count(stage, positional, script)
    variables = read(os.environ, training=True)
    python = _python(variables)
    request = stages.Request(variables, find_devices(os.environ, python), python, playground(), flags)
    if named is None:
        trainings = [stages.one_stage(stage.removesuffix("_lora"), positional, request)]
    else:
        trainings = stages.whole_recipe(named, request)
    if named is not None and named.world == "tiny" and not is_dry(variables):
        with Commands().listening() as commands:
            code = commands.run([python, "-m", "tinyllava_switchkd.quickstart.tiny", str(request.tiny)], {})
        if code:
            return code
    return _launch(trainings, dry=is_dry(variables))


def _split(words: list[str]) -> tuple[str, list[str], recipe.Settings]:
    """Split the words into the stage, its arguments, and the flags after them."""
    first = next((index for index, word in enumerate(words) if word.startswith("--") or word == "-h"), len(words))
    flags = stages.parse_flags([word if word != "-h" else "--help" for word in words[first:]])
    stage, *positional = words[:first] or [""]
    return stage, positional, flags


def _check_count(stage: str, positional: list[str], script: str) -> None:
    names = stages.ARGUMENTS[stage.removesuffix("_lora")]
    wanted = len(names.split())
    if len(positional) != wanted:
        raise UsageError(f"{_train_usage(stage, script)}\nIt takes {wanted} arguments, not {len(positional)}.")
    if stage.endswith("_lora"):
        given = positional[names.split().index("TRAIN_RECIPE")]
        if not (given == "lora" or given.startswith("qlora")):
            raise ValueError(f"TRAIN_RECIPE is {given!r}; here it must be lora or qlora.")


def _train_usage(stage: str, script: str) -> str:
    if stage.removesuffix("_lora") in stages.ARGUMENTS:
        start = f"bash {script}" if script else f"tinyllava-switchkd train {stage}"
        return f"Usage: {start} {stages.ARGUMENTS[stage.removesuffix('_lora')]} [--flag value ...]"
    return "\n".join(
        [
            "Usage: tinyllava-switchkd train STAGE ARGUMENTS [--flag value ...]",
            "       tinyllava-switchkd train --recipe NAME|FILE [--flag value ...]",
            *(f"  {name:<9} {arguments}" for name, arguments in stages.ARGUMENTS.items()),
            f"Recipes: {', '.join(recipe.names())}",
        ]
    )


def _launch(trainings: Sequence[stages.Training], *, dry: bool) -> int:
    with Commands().listening() as commands:
        for training in trainings:
            if training.title:
                show(f"== {training.title} ==")
            show(str(training.batch))
            if training.batch.total != training.usual:
                print(f"Note: this is not the usual {training.usual} samples per step.", file=sys.stderr)
            if dry:
                show(str(training))
                continue
            if len(trainings) == 1 and is_rank(training.command):
                break
            code = commands.run(training.command, training.environment)
            if code or commands.interrupted:
                return code or 130
    if not dry and len(trainings) == 1 and is_rank(trainings[0].command):
        return become(trainings[0].command, trainings[0].environment)
    return 0


def _eval(words: list[str], script: str) -> int:
    name, *rest = words or [""]
    first = next((index for index, word in enumerate(rest) if word.startswith("-")), len(rest))
    positional, flags = rest[:first], rest[first:]
    if not name or name.startswith("-") or not 1 <= len(positional) <= 2 or not positional[0]:
        start = f"bash {script}" if script else f"tinyllava-switchkd eval {name.lstrip('-') or 'BENCHMARK'}"
        raise UsageError(f"Usage: {start} MODEL_PATH [MODEL_NAME]")
    model_name = evaluate.check_model(*positional)
    variables = read(os.environ, training=False)
    python = _python(variables)
    devices = find_devices(os.environ, python)
    request = evaluate.Request(positional[0], model_name, variables, devices, python, playground(), tuple(flags))
    if name == "all":
        return _eval_all(request, script or "tinyllava-switchkd eval all")
    command = evaluate.evaluation(name, request)
    if is_dry(variables):
        show(shlex.join(command))
        return 0
    return become(command, request.environment)


def _eval_all(request: evaluate.Request, script: str) -> int:
    """Run all benchmarks that have data, then the report; a failing benchmark does not stop the others."""
    if request.variables.get("SPLIT"):
        raise ValueError("SPLIT applies to a single benchmark; set it for that benchmark's own script.")
    absent, failed, done = [], [], []
    with Commands().listening() as commands:

        def run(command: list[str]) -> bool:
            if is_dry(request.variables):
                show(shlex.join(command))
                return True
            return commands.run(command, request.environment) == 0

        for name in evaluate.every_benchmark():
            if not evaluate.has_data(name, request):
                absent.append(name)
            elif run(evaluate.evaluation(name, request)):
                done.append(name)
            else:
                failed.append(name)
            if commands.interrupted:
                print(f"{script.rsplit('/', 1)[-1]}: interrupted. Run the script again to continue.", file=sys.stderr)
                return 130
        if absent:
            listed = " ".join(absent)
            print(
                f"No data in {request.eval_dir}: {listed}. "
                f"Get them: python -m tinyllava_switchkd.eval.prepare {listed}",
                file=sys.stderr,
            )
        if done and not run(evaluate.report(request)):
            failed.append("the report")
    if failed:
        raise ValueError(f"not finished: {' '.join(failed)}. Run the script again to continue.")
    if not done:
        raise ValueError("no benchmark has data, so nothing was evaluated.")
    return 0


def _recipes(words: list[str], script: str) -> int:
    if not words:
        for name in recipe.names():
            first = recipe.path_of(name).read_text(encoding="utf-8").splitlines()[0]
            show(f"{name:<34} {first.lstrip('# ')}")
        return 0
    for word in words:
        show(recipe.path_of(word).read_text(encoding="utf-8").rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
