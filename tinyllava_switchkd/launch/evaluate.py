"""Commands for evaluations: one benchmark, or all that have data, then the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tinyllava_switchkd.launch.devices import Devices
from tinyllava_switchkd.launch.values import folder_name, split_words
from tinyllava_switchkd.registry import checkpoint_name

MODULE = "tinyllava_switchkd.eval.run"

ORDER = ("pope", "mme", "mmbench", "mmbench_cn", "gqa", "scienceqa", "textvqa", "mmmu", "vizwiz", "vqav2")
"""The paper's ten benchmarks in the order in which they are run, the largest last; others follow."""


@dataclass(frozen=True)
class Request:
    """The options of an evaluation, except the benchmark.

    Attributes:
        model_path: the checkpoint.
        model_name: its name in the folders of answers and results.
        variables: the checked environment variables of an evaluation.
        devices: the devices of this machine.
        python: the interpreter.
        playground: the folder of data and results, unless the variables name others.
        flags: more arguments of the entry point.
    """

    model_path: str
    model_name: str
    variables: Mapping[str, str]
    devices: Devices
    python: str
    playground: Path
    flags: tuple[str, ...] = ()

    @property
    def eval_dir(self) -> Path:
        """The folder of the benchmarks' data and answers, in LLaVA's layout."""
        return Path(self.variables.get("EVAL_DIR") or self.playground / "data" / "eval")

    @property
    def results(self) -> Path:
        """The folder of this model's scores."""
        return Path(self.variables.get("RESULTS_DIR") or self.playground / "results") / self.model_name

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables to set for the command."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.devices.gpus)} if self.devices.gpus else {}


def check_model(model_path: str, model_name: str = "") -> str:
    """The model's name: the given one, or else `checkpoint_name`.

    Raises:
        ValueError: there is no such folder, or the name is not a valid folder name.
    """
    path = model_path.rstrip("/") or "/"
    if path.startswith(("/", "./", "../")) and not Path(path).is_dir():  # these cannot be hub names
        raise ValueError(f"there is no checkpoint folder {model_path}.")
    if not model_name:
        model_name = checkpoint_name(Path(path).resolve() if Path(path).name in ("", "..") else path)
    wrong = folder_name(model_name)
    if wrong is not None:
        raise ValueError(f"MODEL_NAME is {model_name!r}; it must be {wrong}.")
    return model_name


def every_benchmark() -> list[str]:
    """All registered benchmarks, in the order in which they are run."""
    from tinyllava_switchkd.eval.benchmarks import names

    return [*ORDER, *(name for name in names() if name not in ORDER)]


def has_data(name: str, request: Request) -> bool:
    """Whether the benchmark's questions exist. Malformed ones count: the benchmark itself reports them."""
    from tinyllava_switchkd.eval.benchmarks import BenchmarkFactory

    benchmark = BenchmarkFactory(name)
    try:
        next(iter(benchmark.questions(request.eval_dir / benchmark.folder)), None)
    except FileNotFoundError:
        return False
    except ValueError:
        pass
    return True


def evaluation(name: str, request: Request) -> list[str]:
    """The command that runs one benchmark.

    Raises:
        ValueError: there is no such benchmark.
    """
    from tinyllava_switchkd.eval.benchmarks import BenchmarkFactory

    variables, benchmark = request.variables, BenchmarkFactory(name)
    data = request.eval_dir / benchmark.folder
    answers, score = data / benchmark.answers_folder / request.model_name, name
    words = [name, "--model_path", request.model_path, "--model_name", request.model_name, "--data_dir", str(data)]
    words += ["--batch_size", variables.get("BATCH_SIZE", "16")]
    split = variables.get("SPLIT", "")
    if split:
        answers, score = answers / split, f"{name}-{split}"
        words += ["--split", split]
    elif benchmark.upload is not None:  # LLaVA's eval.zip contains only the evaluation server's split
        try:
            split = benchmark.split_of(data)
        except (FileNotFoundError, ValueError):
            split = ""
    if benchmark.upload is not None and split.startswith("test"):
        upload = data / "answers_upload" / split / f"{request.model_name}.{benchmark.upload}"
        words += ["--submission", str(upload)]
    words += ["--output_dir", str(answers), "--score", str(request.results / f"{score}.json")]
    for variable, flag in (("LIMIT", "--limit"), ("CONV_MODE", "--template")):
        if variable in variables:
            words += [flag, variables[variable]]
    words += [*split_words(variables.get("EXTRA_ARGS", "")), *request.flags]
    if not request.devices.gpus:
        words += ["--device", "cpu"]
    if request.devices.processes > 1:
        words += ["--processes", str(request.devices.processes)]
    return [request.python, "-m", MODULE, *words]


def report(request: Request) -> list[str]:
    """The command that writes the model's scores as a table."""
    results = str(request.results)
    return [request.python, "-m", "tinyllava_switchkd.eval.report", results, "--output_dir", results]
