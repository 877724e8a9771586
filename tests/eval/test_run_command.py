"""The command: all ten benchmarks, its records and flags, and its errors for bad input."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.eval.miniature import picture, read_lines, write_benchmark, write_checkpoint, write_lines, write_pope
from tests.tiny import tiny_tokenizer
from tinyllava_switchkd import runtime
from tinyllava_switchkd.eval import lmms_plugin
from tinyllava_switchkd.eval.benchmarks import BENCHMARKS, BenchmarkFactory
from tinyllava_switchkd.eval.generate import Answerer, dtype_of
from tinyllava_switchkd.eval.guesses import Guesses, try_guesses
from tinyllava_switchkd.eval.job import checkpoint_digest
from tinyllava_switchkd.eval.run import main
from tinyllava_switchkd.registry import checkpoint_name


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-vlm")


@pytest.fixture(scope="module")
def pope(tmp_path_factory):
    return write_pope(tmp_path_factory.mktemp("data") / "pope", images=2)


def command(checkpoint, name, data, out, *more) -> list[str]:
    common = [name, "--model_path", str(checkpoint), "--data_dir", str(data), "--output_dir", str(out)]
    return [*common, "--max_new_tokens", "4", *more]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_answered_and_scored(name, checkpoint, tmp_path):
    data = write_benchmark(name, tmp_path)
    assert main(command(checkpoint, name, data, tmp_path / "out", "--score", str(tmp_path / "score.json"))) == 0
    questions = list(BenchmarkFactory(name).questions(data))
    rows = read_lines(tmp_path / "out" / "answers.jsonl")
    assert [row["question_id"] for row in rows] == [question.question_id for question in questions]
    keys = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    if name.startswith("mmbench"):
        keys[3:3] = ["round_id", "options", "option_char"]
    assert list(rows[0]) == keys
    assert len({row["answer_id"] for row in rows}) == len(rows)
    assert {row["model_id"] for row in rows} == {"tiny-vlm"}
    assert len({row["text"] for row in rows}) > 3
    score = json.loads((tmp_path / "score.json").read_text())
    assert score["missing"] == 0
    assert score["run"]["split"] == score["split"]
    assert score["run"]["counts"]["answered"] == len(questions)


def test_what_a_result_carries(checkpoint, pope, tmp_path):
    score_file = tmp_path / "results" / "pope.json"
    assert main(command(checkpoint, "pope", pope, tmp_path / "out", "--score", str(score_file))) == 0
    score = json.loads(score_file.read_text())
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert score["run"] == run
    assert run["model_name"] == "tiny-vlm"
    assert run["checkpoint_digest"] == checkpoint_digest(checkpoint)
    assert run["conversation_template"] == "phi"
    assert run["image_aspect_ratio"] == "square"
    assert run["prompt_protocol"].startswith("LLaVA-1.5")
    assert run["decoding"] == {
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "max_new_tokens": 4,
        "dtype": "float32",
    }
    assert run["split"] == "test"
    assert run["counts"] == {"questions": 18, "answered": 18, "generated": 6, "images": 2, "unreadable_images": 0}
    assert run["packages"]["torch"] == torch.__version__.split("+")[0] or run["packages"]["torch"] == torch.__version__
    assert {"python", "transformers", "tinyllava_switchkd"} <= run["packages"].keys()


def test_digest_is_of_what_matters(tmp_path):
    folder = Path(write_checkpoint(tmp_path / "a"))
    digest = checkpoint_digest(folder)
    for name in ("README.md", "trainer_state.json", "optimizer.pt"):
        (folder / name).write_text("x")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_text("x")
    assert checkpoint_digest(folder) == digest
    assert checkpoint_digest(write_checkpoint(tmp_path / "b")) == digest
    assert checkpoint_digest(write_checkpoint(tmp_path / "c", seed=1)) != digest
    (folder / "connector").mkdir()
    (folder / "connector" / "pytorch_model.bin").write_text("x")  # the split layout
    assert checkpoint_digest(folder) != digest


def test_digest_is_of_shards_with_any_name(tmp_path):
    index = {"weight_map": {"a": "first.safetensors", "b": "other.safetensors", "c": "model-1.safetensors"}}
    (tmp_path / "model-1.safetensors").write_text("c")
    usual = checkpoint_digest(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_digest(tmp_path) == usual  # as before 0.2.0, so that answers made then can be continued
    digests = []
    for text in ("a", "another a"):
        (tmp_path / "first.safetensors").write_text(text)
        digests.append(checkpoint_digest(tmp_path))
    assert len({usual, *digests}) == 3


def test_benchmarks_have_llavas_length_limits():
    limits = {name: BenchmarkFactory(name).max_new_tokens for name in BENCHMARKS}
    long = {"scienceqa", "mmbench", "mmbench_cn", "mmmu"}
    assert limits == {name: 1024 if name in long else 128 for name in BENCHMARKS}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("playground/checkpoints/my-vlm/", "my-vlm"),
        ("runs/my-vlm/checkpoint-500", "my-vlm_checkpoint-500"),
        ("org/TinyLLaVA-3.1B", "TinyLLaVA-3.1B"),
        ("./checkpoint-5", "checkpoint-5"),
    ],
)
def test_default_name(path, name):
    assert checkpoint_name(path) == name


# -------------------------------------------------------------------------------- template, image policy, dtype


def test_a_differing_flag_warns(checkpoint, pope, tmp_path, caplog):
    flags = ("--conv_mode", "llama", "--image_aspect_ratio", "pad", "--limit", "2")
    assert main(command(checkpoint, "pope", pope, tmp_path / "out", *flags)) == 0
    assert "trained with the conversation template 'phi' and is asked with 'llama'" in caplog.text
    assert "trained with image_aspect_ratio 'square' and is shown images with 'pad'" in caplog.text
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["conversation_template"], run["image_aspect_ratio"]) == ("llama", "pad")


def test_an_agreeing_flag_does_not(checkpoint, pope, tmp_path, caplog):
    flags = ("--conv_mode", "phi", "--image_aspect_ratio", "square", "--limit", "2")
    assert main(command(checkpoint, "pope", pope, tmp_path / "out", *flags)) == 0
    assert "trained with" not in caplog.text


def test_a_checkpoint_without_a_template(pope, tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "v1", template=None)
    assert main(command(checkpoint, "pope", pope, tmp_path / "out")) == 1
    assert "does not name its conversation template" in capsys.readouterr().err
    assert main(command(checkpoint, "pope", pope, tmp_path / "out", "--conv_mode", "phi", "--limit", "1")) == 0
    assert main(command(checkpoint, "pope", pope, tmp_path / "out", "--conv_mode", "vicuna_v1")) == 1
    assert "Unknown conversation template 'vicuna_v1'" in capsys.readouterr().err


def test_the_checkpoint_decides(pope, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "padded", template="llama", image_aspect_ratio="pad")
    answerer = Answerer.from_pretrained(checkpoint, device="cpu")
    assert (answerer.template, answerer.image_aspect_ratio) == ("llama", "pad")
    assert answerer.pixels_of.image_aspect_ratio == "pad"


def test_dtype(checkpoint):
    config = Answerer.from_pretrained(checkpoint, device="cpu", dtype="bfloat16").model.config
    assert config.dtype == torch.bfloat16
    assert dtype_of(config, "auto", "cpu") == torch.float32
    assert dtype_of(config, "auto", "cuda") == torch.bfloat16
    config.dtype = torch.float16
    assert dtype_of(config, "auto", "cuda:1") == torch.float16
    config.dtype = config.text_config.dtype = torch.float32
    assert dtype_of(config, "auto", "cuda") == torch.bfloat16
    assert dtype_of(config, "float32", "cuda") == torch.float32
    with pytest.raises(ValueError, match="Unknown dtype 'int8'; choose one of auto, float32"):
        dtype_of(config, "int8", "cpu")


def test_a_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert runtime.default_device() == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert runtime.default_device() == "cuda:3"


def test_guessing_changes_no_answer(checkpoint, pope, tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(
        "tinyllava_switchkd.eval.generate.try_guesses", lambda *a: tried.append(a[4]) or try_guesses(*a)
    )
    monkeypatch.setattr(Guesses, "tokens", lambda self: tiny_tokenizer("phi")("abcde").input_ids)
    texts = {}
    for way in ((), ("--guess_answers",)):
        out = tmp_path / f"out{len(way)}"
        assert main(command(checkpoint, "pope", pope, out, "--batch_size", "4", *way)) == 0
        texts[way] = [row["text"] for row in read_lines(out / "answers.jsonl")]
        assert bool(tried) == bool(way)
    assert texts[()] == texts["--guess_answers",]


# ------------------------------------------------------------------------------------------------------ bad images


@pytest.fixture
def broken_pope(tmp_path):
    """POPE with one picture of three broken: 9 of 27 questions."""
    folder = write_pope(tmp_path / "pope", images=3)
    (folder / "val2014" / "1.png").write_bytes(b"this is no picture")
    return folder


def test_a_broken_image_costs_its_own_questions_only(checkpoint, broken_pope, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(checkpoint, "pope", broken_pope, out)) == 1
    error = capsys.readouterr().err
    assert "9 of 27 questions of POPE have no answer" in error
    assert str(broken_pope / "val2014" / "1.png") in error
    assert "--skip_bad_images" in error
    assert len(read_lines(out / "answers.part-0.jsonl")) == 18
    picture(broken_pope / "val2014" / "1.png", 1)  # repaired
    assert main(command(checkpoint, "pope", broken_pope, out)) == 0
    assert len(read_lines(out / "answers.jsonl")) == 27


def test_a_broken_image_may_be_left_out(checkpoint, broken_pope, tmp_path, caplog):
    out, score = tmp_path / "out", tmp_path / "score.json"
    flags = ("--skip_bad_images", "--score", str(score))
    assert main(command(checkpoint, "pope", broken_pope, out, *flags)) == 0
    assert "An image cannot be read" in caplog.text
    assert "9 of 27 questions have no answer and count as wrong" in caplog.text
    result = json.loads(score.read_text())
    assert (result["total"], result["answered"], result["missing"]) == (27, 18, 9)
    assert result["run"]["counts"]["unreadable_images"] == 1
    assert len(json.loads((out / "missing.json").read_text())) == 9


def test_an_image_that_is_too_narrow_for_the_tower_is_an_unreadable_one(tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "tiny-vlm", image_aspect_ratio="pad")
    data, out = write_pope(tmp_path / "pope", images=2), tmp_path / "out"
    Image.new("L", (14_000, 1)).save(data / "val2014" / "0.png")  # decodes, but not as a square of 14,000 x 14,000
    assert main(command(checkpoint, "pope", data, out)) == 1
    assert "0.png (an image of 14000 x 1 pixels is too narrow" in capsys.readouterr().err
    assert main(command(checkpoint, "pope", data, out, "--skip_bad_images")) == 0
    assert len(read_lines(out / "answers.jsonl")) == 9


def test_absent_images_are_noticed_before_the_model_is_loaded(checkpoint, tmp_path, capsys, monkeypatch, caplog):
    data = write_pope(tmp_path / "pope", images=3)
    (data / "val2014" / "2.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "from_pretrained", None)
        assert main(command(checkpoint, "pope", data, tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert f"1 of 3 images of POPE do not exist, the first is {data / 'val2014' / '2.png'}" in error
    assert main(command(checkpoint, "pope", data, tmp_path / "out", "--skip_bad_images")) == 0
    assert "1 of 3 images of POPE do not exist" in caplog.text
    assert len(read_lines(tmp_path / "out" / "answers.jsonl")) == 18


def test_pictures_in_the_table_may_be_broken_too(checkpoint, tmp_path, capsys):
    data = write_benchmark("mmbench", tmp_path)
    table = next(data.glob("*.tsv"))
    header, first, *rest = table.read_text(encoding="utf-8").split("\n")
    cells = dict(zip(header.split("\t"), first.split("\t"), strict=True)) | {"image": "bm8gaW1hZ2U="}
    table.write_text("\n".join([header, "\t".join(cells.values()), *rest]), encoding="utf-8")
    assert main(command(checkpoint, "mmbench", data, tmp_path / "out", "--limit", "6")) == 1
    error = capsys.readouterr().err
    assert f"1 of 6 questions of MMBench have no answer: {cells['index']}" in error
    assert "an encoded image of 8 bytes" in error


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"benchmark": "popo"}, "Unknown benchmark 'popo'. Registered: gqa, "),
        ({"--data_dir": "/nonexistent"}, "The data folder /nonexistent does not exist"),
        ({"--model_path": "/nonexistent"}, "There is no folder '/nonexistent'"),
        ({"--split": "dev"}, "POPE has no split 'dev', only test."),
        ({"--device": "tpu7"}, "torch does not know the device 'tpu7'"),
        ({"--device": "cuda:99"}, "The device is 'cuda:99', but torch sees "),
        ({"--output_dir": "/dev/null"}, "The output folder /dev/null is a file; name a folder."),
    ],
)
def test_one_clear_sentence(change, message, checkpoint, pope, tmp_path, capsys):
    flags = {"--data_dir": str(pope), "--model_path": checkpoint, "--output_dir": str(tmp_path / "out")} | change
    name = flags.pop("benchmark", "pope")
    assert main([name, *(part for flag in flags.items() for part in flag)]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error


def test_too_little_memory_for_one_question(checkpoint, pope, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    monkeypatch.setattr(Answerer, "answer", full)
    assert main(command(checkpoint, "pope", pope, tmp_path / "out", "--device", "cpu")) == 1
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: the GPU's memory is too small") and "Tried to allocate 2.00 GiB." in error


def test_a_malformed_question_is_named_by_line(checkpoint, tmp_path, capsys):
    data = write_pope(tmp_path / "pope", images=1)
    file = data / "llava_pope_test.jsonl"
    file.write_text(file.read_text() + '{"question_id": 99}\n')
    assert main(command(checkpoint, "pope", data, tmp_path / "out")) == 1
    assert f"{file}, line 10: no 'image' and no 'text'." in capsys.readouterr().err


def test_no_questions(checkpoint, tmp_path, capsys):
    write_lines(tmp_path / "pope" / "llava_pope_test.jsonl", [])
    assert main(command(checkpoint, "pope", tmp_path / "pope", tmp_path / "out")) == 1
    assert "POPE has no questions" in capsys.readouterr().err


def test_another_kind_of_model(pope, tmp_path, capsys):
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text('{"model_type": "qwen2"}')
    assert main(command(tmp_path / "llm", "pope", pope, tmp_path / "out")) == 1
    assert "is the configuration of a 'qwen2' model, not of a TinyLLaVA" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--batch_size", "0"), ("--limit", "-1"), ("--dtype", "int4"), ()])
def test_wrong_flags_are_refused_by_the_parser(flags, capsys):
    output = ("--output_dir", "o") if flags else ()
    with pytest.raises(SystemExit):
        main(["pope", "--model_path", "m", "--data_dir", "d", *output, *flags])
    assert "error:" in capsys.readouterr().err


def test_a_split_without_ground_truth_is_written_for_the_server(checkpoint, tmp_path, capsys):
    data = write_benchmark("vizwiz", tmp_path)
    questions = read_lines(data / "llava_val.jsonl")[:6]
    for number, question in enumerate(questions):
        question["question_id"] = question["image"] = f"VizWiz_test_{number:08}.jpg"
        picture(data / "test" / question["image"], number)
    write_lines(data / "llava_test.jsonl", questions)
    upload, score = tmp_path / "upload.json", tmp_path / "score.json"
    flags = ("--split", "test", "--submission", str(upload), "--score", str(score))
    assert main(command(checkpoint, "vizwiz", data, tmp_path / "out", *flags)) == 0
    assert [row["image"] for row in json.loads(upload.read_text())] == [row["image"] for row in questions]
    result = json.loads(score.read_text())
    assert result["score"] is None
    assert result["run"]["split"] == "test"


def test_a_test_table_alone_is_the_test_split(checkpoint, tmp_path):
    data = write_benchmark("mmbench", tmp_path)
    (data / "mmbench_dev_20230712.tsv").rename(data / "mmbench_test_20230712.tsv")
    flags = ("--limit", "8", "--submission", str(tmp_path / "upload.xlsx"), "--score", str(tmp_path / "score.json"))
    assert main(command(checkpoint, "mmbench", data, tmp_path / "out", *flags)) == 0
    result = json.loads((tmp_path / "score.json").read_text())
    assert (result["run"]["split"], result["details"]["table"]) == ("test", "mmbench_test_20230712.tsv")


def test_lmms_evals_entry_point_names_the_plugin():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."lmms_eval.models"]' in text
    assert f'"{lmms_plugin.__name__}:manifests"' in text
    assert callable(lmms_plugin.manifests)


@pytest.fixture(autouse=True)
def _quiet():
    yield
    logging.getLogger("tinyllava_switchkd").setLevel(logging.NOTSET)
