"""The bash scripts: their arguments and arithmetic, and a run of the whole chain of stages on tiny models."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.eval.forked import ranks
from tests.launch.scripts import SCRIPTS as ALL_SCRIPTS
from tests.launch.scripts import run_here
from tests.train.ranks import codes_on_ranks
from tests.train.world import LENGTH, write_world
from tinyllava_switchkd.model import load_pretrained_model
from tinyllava_switchkd.train.train import main

SCRIPTS = ALL_SCRIPTS / "train"
MODULE = "tinyllava_switchkd.train.train"
OWN = ("GPUS", "LAUNCHER", "ZERO", "PRECISION", "CUDA_VISIBLE_DEVICES", "MAX_STEPS", "EXTRA_ARGS", "HOSTFILE", "NNODES")


def clean(environment):
    """This process's environment without the variables that scripts read, plus `environment`."""
    inherited = {name: value for name, value in os.environ.items() if name not in OWN}
    return {**inherited, "PYTHON": sys.executable, **{name: str(value) for name, value in environment.items()}}


def bash(script, *arguments, check=True, **environment):
    """Run a script with a clean environment; returns the completed process."""
    words = ["bash", str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(words, env=clean(environment), capture_output=True, text=True, timeout=600)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def here(script, *arguments, **environment):
    """As `bash`, but without starting a shell and an interpreter."""
    return run_here(SCRIPTS / script, *arguments, environment=clean(environment))


NINE = [
    "data.json",
    "images",
    "Qwen/Qwen2.5-0.5B",
    "google/siglip-so400m-patch14-384",
    "",
    "mlp2x_gelu",
    "base",
    "common",
    2048,
]
TEN = [*NINE[:6], "qwen2_base", *NINE[6:]]


def commands(script, *arguments, **environment):
    """The commands that a script would run: the launcher's part and the entry point's arguments of each."""
    done = here(script, *arguments, DRY_RUN=1, **{"CUDA_VISIBLE_DEVICES": "0,1,2,3", **environment})
    assert done.returncode == 0, done.stderr
    lines = [line.split(f" {MODULE} ") for line in done.stdout.splitlines() if MODULE in line]
    return [(launcher, shlex.split(rest)) for launcher, rest in lines]


def dry_run(script, *arguments, **environment):
    """The launcher's part of the one command that a script would run, and its arguments as a dictionary."""
    ((launcher, words),) = commands(script, *arguments, **environment)
    return launcher, {name[2:]: value for name, value in zip(words[::2], words[1::2], strict=True)}


@pytest.mark.parametrize(
    ("script", "count"),
    [
        ("pretrain.sh", 9),
        ("finetune.sh", 10),
        ("distill.sh", 11),
        ("finetune_lora.sh", 10),
        ("distill_lora.sh", 11),
        ("custom_finetune.sh", 5),
    ],
)
def test_wrong_number_of_arguments(script, count):
    for wrong in (0, count - 1, count + 1):
        done = here(script, *["x"] * wrong)
        assert done.returncode == 1 and not done.stdout
        assert "Usage:" in done.stderr and f"takes {count} arguments, not {wrong}" in done.stderr


@pytest.mark.parametrize("arguments", [NINE, ["two words", '"quoted"', "", "$HOME"]], ids=["right", "wrong"])
def test_bash_and_the_stand_in_run_the_same(arguments):
    """The other tests skip bash and its interpreter; here the arguments arrive unchanged."""
    environment = {"DRY_RUN": 1, "CUDA_VISIBLE_DEVICES": "0,1", "LEARNING_RATE": "3e-4"}
    one, other = (
        bash("pretrain.sh", *arguments, check=False, **environment),
        here("pretrain.sh", *arguments, **environment),
    )
    assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)
    assert one.returncode == (arguments != NINE)


def test_stages_have_tinyllavas_settings_and_names():
    launcher, pretrain = dry_run("pretrain.sh", *NINE, OUTPUT_ROOT="/out")
    assert "deepspeed" in launcher and "localhost:0" in launcher
    name = "/out/tiny-llava-Qwen2.5-0.5B-siglip-so400m-patch14-384-base"
    assert pretrain["output_dir"] == f"{name}-pretrain"
    assert (pretrain["learning_rate"], pretrain["template"], pretrain["bf16"]) == ("1e-3", "pretrain", "True")
    tuned = ("tune_type_llm", "tune_type_vision_tower", "tune_type_connector")
    assert [pretrain[part] for part in tuned] == ["frozen", "frozen", "full"]
    assert pretrain["deepspeed"].endswith("zero2.json") and "vision_tower2" not in pretrain

    _, finetune = dry_run("finetune.sh", *TEN, OUTPUT_ROOT="/out", ZERO=3)
    assert finetune["output_dir"] == f"{name}-finetune" and finetune["pretrained_model_path"] == f"{name}-pretrain"
    assert (finetune["learning_rate"], finetune["template"]) == ("2e-5", "qwen2_base")
    assert [finetune[part] for part in tuned] == ["full", "frozen", "full"]
    assert finetune["deepspeed"].endswith("zero3.json") and finetune["group_by_modality_length"] == "True"

    _, distill = dry_run("distill.sh", *TEN, "/teacher", OUTPUT_ROOT="/out", VISION_TOWER_LR="1e-5")
    assert distill["output_dir"] == f"{name}-distill" and distill["pretrained_model_path"] == f"{name}-pretrain"
    assert distill["teacher_path"] == "/teacher" and [distill[part] for part in tuned] == ["full"] * 3
    assert (distill["temperature"], distill["align_weight"], distill["switch_weight"]) == ("3.0", "1.0", "1.0")
    assert distill["vision_tower_lr"] == "1e-5" and distill["teacher_bits"] == "16"
    assert "attn_implementation" not in distill  # chosen by the entry point
    _, distill = dry_run("distill.sh", *TEN, "/teacher", TEACHER_BITS=4, ATTN_IMPLEMENTATION="eager")
    assert (distill["teacher_bits"], distill["attn_implementation"]) == ("4", "eager")

    _, lora = dry_run("finetune_lora.sh", *TEN[:8], "lora", TEN[9])
    assert (lora["tune_type_llm"], lora["lora_r"], lora["lora_alpha"]) == ("lora", "128", "256")
    assert lora["learning_rate"] == "2e-4"


@pytest.mark.parametrize(
    ("gpus", "per_device", "accumulate"),
    [(1, 32, 8), (2, 32, 4), (4, 32, 2), (8, 32, 1), (16, 16, 1), (3, 32, 3), (300, 1, 1)],
)
def test_global_batch_is_kept(gpus, per_device, accumulate):
    visible = ",".join(map(str, range(gpus)))
    _, arguments = dry_run("pretrain.sh", *NINE, CUDA_VISIBLE_DEVICES=visible)
    assert arguments["per_device_train_batch_size"] == str(per_device)
    assert arguments["gradient_accumulation_steps"] == str(accumulate)
    assert gpus in (3, 300) or per_device * accumulate * gpus == 256


def test_batch_from_the_environment():
    def batch(**environment):
        _, arguments = dry_run("finetune.sh", *TEN, **environment)
        return int(arguments["per_device_train_batch_size"]), int(arguments["gradient_accumulation_steps"])

    assert batch() == (8, 4)
    assert batch(PER_DEVICE_BATCH_SIZE=2) == (2, 16)
    assert batch(PER_DEVICE_BATCH_SIZE=2, GRAD_ACCUM=3) == (2, 3)
    assert batch(GLOBAL_BATCH_SIZE=64, GRAD_ACCUM=2) == (8, 2)
    assert batch(GPUS=2) == (8, 8)
    assert batch(GPUS="2,3") == (8, 8)
    assert batch(FINETUNE_PER_DEVICE_BATCH_SIZE=1) == (1, 32)


def test_launchers(tmp_path):
    hosts = tmp_path / "hostfile"
    hosts.write_text("# mine\nworker-1 slots=8\nworker-2 slots=8\n")
    launcher, arguments = dry_run("finetune.sh", *TEN, HOSTFILE=hosts)
    assert f"--hostfile {hosts}" in launcher and arguments["gradient_accumulation_steps"] == "1"
    nodes = {"LAUNCHER": "torchrun", "NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": 1234}
    launcher, arguments = dry_run("finetune.sh", *TEN, **nodes)
    for words in ("--nproc_per_node 4", "--nnodes 2", "--node_rank 1", "--master_addr 10.0.0.1", "--master_port 1234"):
        assert words in launcher
    assert arguments["gradient_accumulation_steps"] == "2"
    launcher, arguments = dry_run("finetune.sh", *TEN, LAUNCHER="torchrun", ZERO="none")
    assert "deepspeed" not in arguments
    launcher, arguments = dry_run("finetune.sh", *TEN, DEVICE="cpu")
    assert launcher.split()[1] == "-m" and "bf16" not in arguments and arguments["use_cpu"] == "True"
    launcher, _ = dry_run("finetune.sh", *TEN, DEVICE="cpu", GPUS=2)
    assert "deepspeed" in launcher and "--num_gpus 2" in launcher


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"GPUS": 5}, "GPUS is 5, but only 0,1,2,3"),
        ({"LAUNCHER": "accelerate"}, "LAUNCHER is 'accelerate'"),
        ({"LAUNCHER": "python"}, "one process"),
        ({"ZERO": "4"}, "ZERO is '4'"),
        ({"ZERO": "mine.json"}, "mine.json does not exist"),
        ({"PRECISION": "int4"}, "PRECISION is 'int4'"),
        ({"NNODES": 2}, "LAUNCHER=torchrun"),
        ({"NNODES": 2, "LAUNCHER": "torchrun"}, "MASTER_ADDR"),
        ({"HOSTFILE": "gone"}, "gone does not exist"),
        ({"DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}, "no GPU"),
    ],
)
def test_wrong_environment_is_refused(environment, words):
    done = here("finetune.sh", *TEN, **{"DRY_RUN": 1, "CUDA_VISIBLE_DEVICES": "0,1,2,3", **environment})
    assert done.returncode == 1 and words in done.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("scripts") / "world")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tiny(root, **changes):
    """Environment of a short run with SGD, so that weights differ no more than gradients."""
    return {
        "DEVICE": "cpu",
        "OUTPUT_ROOT": root,
        "GLOBAL_BATCH_SIZE": 4,
        "PER_DEVICE_BATCH_SIZE": 2,
        "GROUP_BY_MODALITY": False,
        "MAX_STEPS": 2,
        "LEARNING_RATE": 0.1,
        "REPORT_TO": "none",
        "OMP_NUM_THREADS": 1,
        "EXTRA_ARGS": "--optim sgd --max_grad_norm 0 --disable_tqdm True",
        **changes,
    }


def chain(world, root, **changes):
    """Three stages: pre-training, fine-tuning its result, and distilling its result from that; and the environment."""
    models = [world["llm"], world["tower"], "", "mlp2x_gelu"]
    more = [world["finetune"], world["images"], *models, "qwen2_base", "test", "common", 400]
    stages = {
        "pretrain": ["pretrain.sh", world["pretrain"], world["images"], *models, "test", "common", LENGTH],
        "finetune": ["finetune.sh", *more],
        "distill": ["distill.sh", *more, output(root, "finetune")],
    }
    return stages, tiny(root, **changes)


def output(root, stage):
    return Path(root, f"tiny-llava-qwen2-student-siglip-tiny-test-{stage}")


def weights(root, stage):
    return load_file(output(root, stage) / "model.safetensors")


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """Output of the chain in this process with the scripts' arguments, which the sharded runs must equal."""
    root = tmp_path_factory.mktemp("alone")
    stages, environment = chain(world, root)
    for script in stages.values():
        for _, arguments in commands(*script, **environment):
            assert main(arguments) == 0
    return root


def test_the_chain_of_stages(alone):
    pretrain, finetune, distill = (weights(alone, stage) for stage in ("pretrain", "finetune", "distill"))
    assert pretrain.keys() == finetune.keys() == distill.keys()
    for first, second in ((pretrain, finetune), (finetune, distill)):
        assert any(not torch.equal(first[name], second[name]) for name in first)
    model, tokenizer, _, _ = load_pretrained_model(output(alone, "distill"), device="cpu")
    prompt = tokenizer("hello", return_tensors="pt").input_ids
    assert model.generate(prompt, max_new_tokens=3, do_sample=False).shape == (1, 3)


NOTED = f"""
import json, os, pathlib, sys
words = sys.orig_argv
at = words.index("-m") if "-m" in words else len(words)
if words[at + 1 : at + 2] == ["{MODULE}"]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    said = {{"argv": words[at + 2 :], **{{name: os.environ.get(name) for name in names}}}}
    pathlib.Path(__file__).with_name("rank" + os.environ["RANK"]).write_text(json.dumps(said))
    os._exit(0)
"""
"""A ``sitecustomize`` with which a rank records how it was started and ends before its slow imports."""


@pytest.mark.slow
def test_deepspeeds_launcher_starts_the_ranks_as_the_tests_do(world, tmp_path):
    """A real start, from bash to the ranks' first line; the tests below check what such ranks learn."""
    (tmp_path / "sitecustomize.py").write_text(NOTED)
    stages, environment = chain(world, tmp_path, GPUS=2, LAUNCHER="deepspeed", ZERO=3, MASTER_PORT=free_port())
    ((_, arguments),) = commands(*stages["pretrain"], **environment)
    bash(*stages["pretrain"], **environment, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    found = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
    for rank, (said, own) in enumerate(zip(found, ranks(2), strict=True)):
        assert sorted(said.pop("argv")) == sorted([f"--local_rank={rank}", *arguments])  # in the environment's order
        assert said == {**own, "MASTER_PORT": str(environment["MASTER_PORT"])}


@pytest.mark.slow
@pytest.mark.xdist_group("deepspeed")
@pytest.mark.parametrize("zero", [2, 3])
def test_two_ranks_under_deepspeed_equal_one_process(alone, world, tmp_path, zero):
    """One sample per rank and small chunks: ranks differ in modality and in how often they run the head.

    Fine-tuning in between is one process's. Under ZeRO-2 the distillation alone, with a teacher cache that one process
    has filled before; the ranks have nothing to add to it.
    """
    stages, environment = chain(
        world,
        tmp_path,
        GPUS=2,
        LAUNCHER="deepspeed",
        ZERO=zero,
        PER_DEVICE_BATCH_SIZE=1,
        GRADIENT_CHECKPOINTING=True,
        MASTER_PORT=free_port(),
    )
    environment["EXTRA_ARGS"] += " --chunk_size 3"
    cached = {"TEACHER_CACHE": tmp_path / "cache"} if zero == 2 else {}
    for stage, script in stages.items():
        if stage == "finetune" or (stage == "pretrain" and cached):
            shutil.copytree(output(alone, stage), output(tmp_path, stage))
            continue
        if cached:
            alone_too = {**environment, "GPUS": "", "LAUNCHER": "python", "ZERO": "", **cached}
            ((_, arguments),) = commands(*script, **alone_too, FILL_TEACHER_CACHE=True)
            assert main(arguments) == 0
        filled = sorted(tmp_path.rglob("cache/*/*"))
        assert on_ranks(script, {**environment, **cached}, tmp_path) == [0, 0]
        assert sorted(tmp_path.rglob("cache/*/*")) == filled and bool(filled) == bool(cached)
        one, two = weights(alone, stage), weights(tmp_path, stage)
        assert one.keys() == two.keys()
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5, stage


METHODS = {
    "llava_kd": {"DISTILL_METHOD": "llava_kd"},
    "align_kd": {"DISTILL_METHOD": "align_kd"},
    "a bridge": {},
}
LORA = " --lora_dropout 0 --lr_scheduler_type constant"


@pytest.mark.slow
@pytest.mark.xdist_group("deepspeed")
@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_under_deepspeed_equals_one_process(alone, world, tmp_path, method, zero):
    """Two ranks, one sample each, some without images: the student is that of one process, and so are the adapters.

    With a bridge under ZeRO-2, the student has LoRA adapters, and the ranks' run is cut off after a step and resumed.
    """
    found = []
    lora = method == "a bridge" and zero == 2
    for place, changes in (
        ("one", {}),
        (
            "two",
            {"GPUS": 2, "LAUNCHER": "deepspeed", "ZERO": zero, "PER_DEVICE_BATCH_SIZE": 1},
        ),
    ):
        stages, environment = chain(world, tmp_path / place, **METHODS[method], **changes)
        script = stages["distill"]
        script[-1] = output(alone, "finetune")
        environment |= {"MAX_STEPS": 1, "PRETRAINED_PATH": output(alone, "pretrain")}
        if method == "a bridge":  # the student keeps the visual token that its teacher drops
            others, at_once = chain(world, tmp_path)
            at_once["EXTRA_ARGS"] += " --mm_vision_select_feature cls_patch"
            for _, arguments in commands(*others["pretrain"], **at_once):
                assert main(arguments) == 0
            environment["PRETRAINED_PATH"] = output(tmp_path, "pretrain")
        if lora:
            script[:1], script[-3] = ["distill_lora.sh"], "lora"
            environment |= {"LORA_R": 2, "LORA_ALPHA": 4, "MAX_STEPS": 2, "SAVE_STEPS": 1}
            environment["EXTRA_ARGS"] += LORA
        folder = output(tmp_path / place, "distill")
        if place == "two":
            assert on_ranks(script, environment, tmp_path) == [0, 0]
            if lora:
                shutil.rmtree(folder / "checkpoint-2")
                for file in (folder / "trainer_state.json", folder / "adapter_model.safetensors"):
                    file.unlink()
                assert on_ranks(script, environment, tmp_path) == [0, 0]
        else:
            for _, arguments in commands(*script, **environment):
                assert main(arguments) == 0
        student = load_file(folder / ("adapter_model.safetensors" if lora else "model.safetensors"))
        found.append({**student, **adapters_of(folder)})
    one, two = found
    assert one.keys() == two.keys() and (method == "llava_kd") != any("adapter" in name for name in one)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


def on_ranks(script, environment, folder):
    """Exit codes of two ranks with the script's arguments, without the start of DeepSpeed's launcher."""
    ((_, arguments),) = commands(*script, **environment)
    codes = codes_on_ranks(2, ["--local_rank={rank}", *arguments], folder / "log")
    assert not any(codes), (folder / "log.0").read_text()[-3000:]
    return codes


def adapters_of(folder):
    file = folder / "distill" / "adapters.safetensors"
    return {f"adapter.{name}": value for name, value in load_file(file).items()} if file.is_file() else {}


def test_the_papers_script(world, tmp_path):
    """Teacher PT and SFT, student PT and DFT, on tiny models."""
    data = {f"{name.upper()}_DATA": world[name] for name in ("pretrain", "finetune")}
    images = {f"{name.upper()}_IMAGES": world["images"] for name in ("pretrain", "finetune")}
    models = {"TEACHER_LLM": world["teacher_llm"], "STUDENT_LLM": world["llm"], "VISION_TOWER": world["tower"]}
    for pair in ("0.5b_from_3b", "1.5b_from_7b"):
        environment = tiny(tmp_path / pair, MAX_STEPS=1, MODEL_MAX_LENGTH=400, **data, **images, **models)
        runs = commands(f"train_switchkd_qwen2.5_{pair}.sh", **environment)
        assert len(runs) == 4
    for _, arguments in runs:
        assert main(arguments) == 0
    name = "tiny-llava-qwen2-student-siglip-tiny-switchkd-distill"
    model, *_ = load_pretrained_model(tmp_path / pair / name, device="cpu")
    assert model.config.hidden_size == 32 and model.config.tune_type_vision_tower == "full"


def test_llava_kds_script(world, tmp_path):
    """Its three stages DPT, SFT and DFT, each from the one before, after the teacher's two."""
    data = {f"{name.upper()}_DATA": world[name] for name in ("pretrain", "finetune")}
    images = {f"{name.upper()}_IMAGES": world["images"] for name in ("pretrain", "finetune")}
    models = {"TEACHER_LLM": world["teacher_llm"], "STUDENT_LLM": world["llm"], "VISION_TOWER": world["tower"]}
    once = {"MAX_STEPS": 1, "WARMUP": 0, "MODEL_MAX_LENGTH": 400}
    runs = commands("llava_kd.sh", **tiny(tmp_path, **once, **data, **images, **models))
    for _, arguments in runs:
        assert main(arguments) == 0
    name = "tiny-llava-qwen2-student-siglip-tiny-llava_kd"
    logged = [
        json.loads((tmp_path / f"{name}-{stage}" / "trainer_state.json").read_text())["log_history"][0]
        for stage in ("pretrain", "finetune", "distill")
    ]
    assert [{"response", "visual", "relation"} <= log.keys() for log in logged] == [True, False, True]
    files = [tmp_path / f"{name}-{stage}" / "model.safetensors" for stage in ("pretrain", "finetune", "distill")]
    dpt, sft, dft = map(load_file, files)
    changed = [
        {key.split(".")[0] for key in one if not torch.equal(one[key], other[key])}
        for one, other in ((dpt, sft), (sft, dft))
    ]
    assert changed == [{"language_model", "connector"}] * 2  # the tower is frozen in all stages


def test_lora_scripts(alone, world, tmp_path):
    models = [world["llm"], world["tower"], "", "mlp2x_gelu"]
    more = [world["finetune"], world["images"], *models, "qwen2_base", "test", "lora", 400]
    environment = tiny(tmp_path, MAX_STEPS=1, LORA_R=2, LORA_ALPHA=4, PRETRAINED_PATH=output(alone, "pretrain"))
    for script in (["finetune_lora.sh", *more], ["distill_lora.sh", *more, output(alone, "finetune")]):
        ((_, arguments),) = commands(*script, **environment)
        assert main(arguments) == 0
    mine = ["custom_finetune.sh", world["finetune"], world["images"], output(alone, "distill"), "qwen2_base"]
    ((_, arguments),) = commands(*mine, tmp_path / "custom", **environment)
    assert main(arguments) == 0
    for folder in (output(tmp_path, "finetune"), output(tmp_path, "distill"), tmp_path / "custom"):
        assert (folder / "adapter_model.safetensors").is_file()
        model, *_ = load_pretrained_model(folder, device="cpu")
        assert model.config.tokenizer_model_max_length == 400


@pytest.mark.slow
def test_a_plain_process(world, tmp_path):
    """The whole path: bash, the command, and the training that replaces it, with its exit code."""
    arguments = [world["pretrain"], world["images"], world["llm"], world["tower"], "", "mlp2x_gelu", "test", "common"]
    bash("pretrain.sh", *arguments, LENGTH, **tiny(tmp_path))
    assert (output(tmp_path, "pretrain") / "model.safetensors").is_file()
    failed = bash("pretrain.sh", *arguments, LENGTH, check=False, **tiny(tmp_path, EXTRA_ARGS="--max_stepz 1"))
    assert failed.returncode == 1 and "There is no argument --max_stepz" in failed.stderr
