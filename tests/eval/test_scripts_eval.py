"""scripts/eval: the commands that the scripts run, and a real run of one of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.eval.miniature import picture, read_lines, write_benchmark, write_checkpoint, write_pope
from tests.launch.scripts import installed, run_here
from tinyllava_switchkd.eval.processes import spawn
from tinyllava_switchkd.eval.run import main as evaluate

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "pope": ("pope", "pope"),
    "mme": ("mme", "MME"),
    "mmbench": ("mmbench", "mmbench"),
    "mmbench_cn": ("mmbench_cn", "mmbench_cn"),
    "vqav2": ("vqav2", "vqav2"),
    "gqa": ("gqa", "gqa"),
    "sqa": ("scienceqa", "scienceqa"),
    "mmmu": ("mmmu", "MMMU"),
    "textvqa": ("textvqa", "textvqa"),
    "textvqa_noocr": ("textvqa_noocr", "textvqa"),
    "vizwiz": ("vizwiz", "vizwiz"),
}


def environment_of(tmp_path, changes):
    """The folder `eval` is EVAL_DIR, `results` is RESULTS_DIR; the device is the CPU, unless changed."""
    base = {key: value for key, value in os.environ.items() if key not in ("LIMIT", "SPLIT", "GPUS", "DEVICE")}
    base |= {"EVAL_DIR": str(tmp_path / "eval"), "DEVICE": "cpu"}
    base |= {"RESULTS_DIR": str(tmp_path / "results"), "CUDA_VISIBLE_DEVICES": ""}
    return base | changes


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Runs a script as `bash` does, but without bash and an interpreter: calls are recorded instead of started."""
    calls = []

    def become(command, environment):
        calls.append([(os.environ | environment)["CUDA_VISIBLE_DEVICES"], *command[1:]])
        return 0

    monkeypatch.setattr("tinyllava_switchkd.launch.__main__.become", become)

    def run(script: str, *args: str, **environment: str):
        calls.clear()
        path = ROOT / "scripts" / "eval" / f"{script}.sh"
        return run_here(path, *args, environment=environment_of(tmp_path, environment)), list(calls)

    return run


@pytest.fixture
def bash(tmp_path):
    """Runs a script with an interpreter that runs only the launcher and records its arguments for other modules.

    The benchmark called by FAIL fails.
    """
    log = tmp_path / "calls"
    interpreter = tmp_path / "python"
    interpreter.write_text(
        "#!/usr/bin/env bash\n"
        f'launch() {{ [ -z "${{BROKEN:-}}" ] || exit 1; exec {sys.executable} "$@"; }}\n'
        '[ "$2" != tinyllava_switchkd.launch ] || launch "$@"\n'
        f'printf "%s\\t" "$CUDA_VISIBLE_DEVICES" "$@" >>{log}; echo >>{log}\n'
        'for word in "$@"; do [ "$word" != "${FAIL:-}" ] || exit 1; done\n'
    )
    interpreter.chmod(0o755)

    def run(script: str, *args: str, **environment: str):
        log.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(ROOT / "scripts" / "eval" / f"{script}.sh"), *args],
            env=environment_of(tmp_path, {"PYTHON": str(interpreter)} | environment),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        lines = log.read_text().splitlines() if log.is_file() else []
        return done, [line.split("\t")[:-1] for line in lines]

    return run


def flags_of(call: list[str]) -> dict[str, str]:
    """The flags of a call of tinyllava_switchkd.eval.run, which all take a value."""
    arguments = call[call.index("tinyllava_switchkd.eval.run") + 2 :]
    return dict(zip(arguments[::2], arguments[1::2], strict=True))


@pytest.mark.parametrize("way", ["bash", "here"])
def test_bash_and_the_stand_in_run_the_same(way, bash, here):
    """The other tests skip bash; here the arguments arrive unchanged."""
    run = {"bash": bash, "here": here}[way]
    done, [call] = run("sqa", "models/my vlm", '"x" $HOME', GPUS="1,2", DEVICE="", CUDA_VISIBLE_DEVICES="0,1,2")
    assert done.returncode == 0, done.stderr
    assert call[:4] == ["1,2", "-m", "tinyllava_switchkd.eval.run", "scienceqa"]
    assert (flags_of(call)["--model_path"], flags_of(call)["--model_name"]) == ("models/my vlm", '"x" $HOME')


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_runs_its_benchmark(script, here, tmp_path):
    name, folder = SCRIPTS[script]
    answers = "answers_noocr" if name == "textvqa_noocr" else "answers"  # its data are TextVQA's
    done, calls = here(script, "models/my-vlm/")
    assert done.returncode == 0, done.stderr
    [call] = calls
    assert call[1:4] == ["-m", "tinyllava_switchkd.eval.run", name]
    assert flags_of(call) == {
        "--model_path": "models/my-vlm/",
        "--model_name": "my-vlm",
        "--data_dir": str(tmp_path / "eval" / folder),
        "--output_dir": str(tmp_path / "eval" / folder / answers / "my-vlm"),
        "--score": str(tmp_path / "results" / "my-vlm" / f"{name}.json"),
        "--batch_size": "16",
        "--device": "cpu",
    }


def test_the_environment_decides(here, tmp_path):
    settings = {"BATCH_SIZE": "3", "LIMIT": "9", "CONV_MODE": "phi", "EXTRA_ARGS": "--dtype float32 --num_workers 2"}
    _, [call] = here("gqa", "org/vlm", "other name", **settings)
    flags = flags_of(call)
    assert {key: flags[key] for key in ("--batch_size", "--limit", "--template", "--dtype", "--num_workers")} == {
        "--batch_size": "3",
        "--limit": "9",
        "--template": "phi",
        "--dtype": "float32",
        "--num_workers": "2",
    }
    assert flags["--model_name"] == "other name"
    assert flags["--score"] == str(tmp_path / "results" / "other name" / "gqa.json")
    _, [call] = here("gqa", "runs/vlm/checkpoint-40")
    assert flags_of(call)["--model_name"] == "vlm_checkpoint-40"


@pytest.mark.parametrize(
    ("script", "split", "upload"),
    [
        ("vqav2", "test-dev", "vqav2/answers_upload/test-dev/vlm.json"),
        ("vizwiz", "test", "vizwiz/answers_upload/test/vlm.json"),
        ("mmbench", "test", "mmbench/answers_upload/test/vlm.xlsx"),
        ("vqav2", "val", None),
        ("pope", "test", None),
    ],
)
def test_another_split_has_files_of_its_own(script, split, upload, here, tmp_path):
    _, [call] = here(script, "vlm", SPLIT=split)
    flags = flags_of(call)
    name, folder = SCRIPTS[script]
    assert flags["--split"] == split
    assert flags["--output_dir"] == str(tmp_path / "eval" / folder / "answers" / "vlm" / split)
    assert flags["--score"] == str(tmp_path / "results" / "vlm" / f"{name}-{split}.json")
    assert flags.get("--submission") == (upload and str(tmp_path / "eval" / upload))


@pytest.mark.parametrize(
    ("script", "split", "question_file"),
    [
        ("vqav2", "test-dev", "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl"),
        ("vizwiz", "test", "vizwiz/llava_test.jsonl"),
        ("mmbench_cn", "test", "mmbench_cn/mmbench_test_cn_20231003.tsv"),
    ],
)
def test_the_servers_split_alone_is_asked_and_gets_its_upload_file(script, split, question_file, here, tmp_path):
    """LLaVA's eval.zip has no val: without an upload file its answers would be useless."""
    path = tmp_path / "eval" / question_file
    path.parent.mkdir(parents=True)
    path.write_text("{}\n")
    _, [call] = here(script, "vlm")
    flags = flags_of(call)
    name, folder = SCRIPTS[script]
    suffix = "xlsx" if script.startswith("mmbench") else "json"
    assert flags["--submission"] == str(tmp_path / "eval" / folder / "answers_upload" / split / f"vlm.{suffix}")
    assert flags["--score"] == str(tmp_path / "results" / "vlm" / f"{name}.json")
    assert "--split" not in flags


def test_several_processes_are_requested(here):
    _, [call] = here("pope", "vlm", GPUS="2")
    assert flags_of(call)["--processes"] == "2"
    assert flags_of(call)["--device"] == "cpu"
    gpus = {"DEVICE": "", "CUDA_VISIBLE_DEVICES": "0,1,2,5"}
    for wanted, visible in ((None, "0,1,2,5"), ("3", "0,1,2"), ("1,5", "1,5"), ("2,", "2")):
        _, [call] = here("pope", "vlm", **gpus, **({} if wanted is None else {"GPUS": wanted}))
        count = visible.count(",") + 1
        assert call[0] == visible
        assert flags_of(call).get("--processes") == (None if count == 1 else str(count))
        assert "--device" not in flags_of(call)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"GPUS": "two"}, "GPUS is 'two'; on a CPU it is the number of processes."),
        ({"GPUS": "0"}, "GPUS is '0'"),
        ({"DEVICE": "cuda"}, "DEVICE is cuda, but this machine shows no GPU"),
        ({"DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": "0,1", "GPUS": "4"}, "GPUS is 4, but only 0,1 are visible."),
    ],
)
def test_wrong_devices(environment, message, here):
    done, calls = here("pope", "vlm", **environment)
    assert done.returncode == 1
    assert message in done.stderr
    assert not calls


@pytest.mark.parametrize("script", [*SCRIPTS, "eval_all"])
@pytest.mark.parametrize("args", [(), ("a", "b", "c"), ("",), ("--help",)])
def test_wrong_arguments(script, args, here):
    done, calls = here(script, *args)
    assert done.returncode == 1
    assert "Usage: bash " in done.stderr
    assert "MODEL_PATH [MODEL_NAME]" in done.stderr
    assert not calls


@pytest.mark.parametrize("script", ["gqa", "eval_all"])
def test_a_missing_checkpoint_is_reported_once(script, bash):
    done, calls = bash(script, "/no such/model")
    assert (done.returncode, calls) == (1, [])
    assert done.stderr == f"{script}.sh: there is no checkpoint folder /no such/model.\n"


def test_all_that_have_data_then_the_report(bash, tmp_path):
    for name in ("pope", "scienceqa", "mme"):
        write_benchmark(name, tmp_path / "eval")
    (tmp_path / "eval" / "gqa" / "answers").mkdir(parents=True)  # answers alone are no data
    done, calls = bash("eval_all", "models/vlm")
    assert done.returncode == 0, done.stderr
    assert [call[3] for call in calls[:-1]] == ["pope", "mme", "scienceqa"]
    results = str(tmp_path / "results" / "vlm")
    assert calls[-1][1:] == ["-m", "tinyllava_switchkd.eval.report", results, "--output_dir", results]
    assert "No data in" in done.stderr
    assert "mmbench mmbench_cn gqa textvqa mmmu vizwiz vqav2 textvqa_noocr" in done.stderr

    done, calls = bash("eval_all", "models/vlm", FAIL="mme")
    assert done.returncode == 1
    assert [call[3] for call in calls[:-1]] == ["pope", "mme", "scienceqa"]  # a failure does not stop the others
    assert calls[-1][2] == "tinyllava_switchkd.eval.report"
    assert "not finished: mme" in done.stderr

    done, _ = bash("eval_all", "models/vlm", FAIL="tinyllava_switchkd.eval.report")
    assert done.returncode == 1
    assert "not finished: the report" in done.stderr

    done, calls = bash("eval_all", "models/vlm", BROKEN="1")  # for example, an interpreter without the package
    assert done.returncode == 1
    assert "No data" not in done.stderr and not calls
    done, _ = bash("eval_all", "models/vlm", SPLIT="test")
    assert done.returncode == 1
    assert "SPLIT applies to a single benchmark" in done.stderr
    done, calls = bash("eval_all", "models/vlm", EVAL_DIR=str(tmp_path / "empty"))
    assert done.returncode == 1
    assert not calls
    assert "nothing was evaluated" in done.stderr


def test_an_interruption_stops_all_later_benchmarks(tmp_path):
    """Ctrl-C reaches every process of the terminal; the run saves its answers and ends itself with 130."""
    for name in ("pope", "mme"):
        write_benchmark(name, tmp_path / "eval")
    interpreter, started, run = tmp_path / "python", tmp_path / "started", tmp_path / "run.py"
    run.write_text(
        "import pathlib, sys, time\n"
        "try:\n"
        f"    with open({str(started)!r}, 'a') as file: print(sys.argv[3], file=file)\n"
        "    time.sleep(120)\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n"
    )
    interpreter.write_text(
        f'#!/usr/bin/env bash\n[ "$2" = tinyllava_switchkd.launch ] || set -- {run} "$@"\nexec {sys.executable} "$@"\n'
    )
    interpreter.chmod(0o755)
    settings = {"PYTHON": interpreter, "EVAL_DIR": tmp_path / "eval", "RESULTS_DIR": tmp_path / "results"}
    environment = os.environ | {"DEVICE": "cpu"} | {name: str(value) for name, value in settings.items()}
    process = subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "eval" / "eval_all.sh"), "vlm"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while not (started.is_file() and started.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130, errors
    assert "eval_all.sh: interrupted. Run the script again to continue." in errors
    assert started.read_text().split() == ["pope"]


HEAVY = """
import atexit, os, pathlib, sys

def leave():
    heavy = [name for name in ("deepspeed", "peft", "gradio") if name in sys.modules]
    pathlib.Path(os.environ["SEEN"], os.environ["RANK"]).write_text(f"heavy: {heavy}")

if "RANK" in os.environ:
    atexit.register(leave)
"""
"""An installed plugin that records which heavy modules a process of an evaluation has imported."""


@pytest.mark.slow
def test_pope_for_real(bash, tmp_path):
    """A picture is broken: nothing else is lost, and the helpful message comes last.

    No FutureWarning of transformers is on the screen, and nothing of training and serving was imported. Once the
    picture is repaired, the rest is done. The script starts several processes by the same flag, see `spawn` below.
    """
    checkpoint = write_checkpoint(tmp_path / "tiny-vlm")
    data = write_pope(tmp_path / "eval" / "pope")
    out, score_file = data / "answers" / "tiny-vlm", tmp_path / "results" / "tiny-vlm" / "pope.json"
    (data / "val2014" / "1.png").write_bytes(b"no picture")
    settings = {"EXTRA_ARGS": "--processes 1 --max_new_tokens 4", "PYTHONPATH": installed(tmp_path, HEAVY)}
    seen = tmp_path / "seen"
    seen.mkdir()
    done, _ = bash("pope", checkpoint, PYTHON=sys.executable, SEEN=str(seen), **settings)
    assert done.returncode == 1
    assert {file.name: file.read_text() for file in seen.iterdir()} == {"0": "heavy: []"}
    assert "9 of 36 questions of POPE have no answer" in done.stderr.strip().splitlines()[-1]
    assert "FutureWarning" not in done.stderr and "Traceback" not in done.stderr
    assert "POPE: " in done.stderr
    assert len(read_lines(out / "answers.part-0.jsonl")) == 27 and not score_file.exists()

    picture(data / "val2014" / "1.png", 1)
    words = ["--model_path", checkpoint, "--data_dir", data, "--output_dir", out, "--score", score_file]
    words += ["--max_new_tokens", 4, "--device", "cpu"]
    assert evaluate(["pope", *map(str, words)]) == 0
    assert [row["question_id"] for row in read_lines(out / "answers.jsonl")] == list(range(36))
    score = json.loads(score_file.read_text())
    assert (score["total"], score["missing"]) == (36, 0)


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("no such file", 1)])
def test_the_exit_status_of_several_processes(argument, status, capfd):
    assert spawn("json.tool", [argument], 2) == status  # a module that is quick
    assert capfd.readouterr().out.count("usage:") == (0 if status else 2)


def test_several_processes_can_be_started_in_a_thread(capfd):
    with ThreadPoolExecutor() as pool:
        assert pool.submit(spawn, "json.tool", ["--help"], 2).result() == 0
    assert capfd.readouterr().out.count("usage:") == 2


@pytest.mark.parametrize("how", ["", "killed"])
def test_errors_of_several_processes_are_printed_last(how, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert spawn("tests.eval.teller", [how], 2) == 1
    *noise, first, second = capfd.readouterr().err.splitlines()
    assert (first, second) == ("[process 1] error: a broken picture", "[process 0] error: a broken picture")
    assert noise[:2] == ["a library has something to say"] * 2
    assert ["ended from outside (SIGKILL" in line for line in noise[2:]] == [True] * (how == "killed")
