"""Model cards have the facts of their folder, in the hub's format, and never replace other people's text."""

import json

import pytest
from huggingface_hub import ModelCard

from tests.model.checkpoints import save
from tests.tiny import tiny_llava
from tinyllava_switchkd.model.card import MARK, main, read_scores, write_model_card
from tinyllava_switchkd.model.export import from_hf_llava, to_hf_llava


@pytest.fixture
def trained(tmp_path):
    """A folder as the trainer writes it."""
    model = tiny_llava(llm_model_name_or_path="Qwen/Qwen2.5-0.5B", vision_model_name_or_path="google/siglip-base")
    folder = save(model, tmp_path / "student", template="qwen2_base")
    settings = {"distill_loss": "dbild", "temperature": 3.0, "learning_rate": 2e-3, "teacher_path": "f" * 64}
    (folder / "fingerprint.json").write_text(json.dumps({**settings, "data_path": "a" * 64}))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 600, "log_history": []}))
    return folder


def test_what_the_folder_knows(trained):
    facts = {"teacher": "me/teacher", "results": {"POPE": 86.4}, "data": ["LLaVA-1.5 mix665k"], "license": "apache-2.0"}
    card = ModelCard.load(write_model_card(trained, facts))
    assert card.data.pipeline_tag == "image-text-to-text" and card.data.license == "apache-2.0"
    assert card.data.base_model == ["Qwen/Qwen2.5-0.5B", "google/siglip-base", "me/teacher"]
    for text in ("mlp2x_gelu", "qwen2_base", "`dbild`", "`3.0`", "`0.002`", "`600`", "POPE | 86.4", "mix665k"):
        assert text in card.text
    assert 'from_pretrained("student")' in card.text and "--to TARGET student OUT" in card.text


def test_written_with_every_checkpoint_and_anew_when_more_is_known(trained):
    before = (trained / "README.md").read_text()
    assert MARK in before and "dbild" not in before  # saved before the fingerprint was there
    write_model_card(trained)
    assert "dbild" in (trained / "README.md").read_text()
    (trained / "README.md").write_text("# Mine\n")
    write_model_card(trained, {"license": "mit"})
    assert (trained / "README.md").read_text() == "# Mine\n"


def test_an_export_carries_what_was_known(trained, tmp_path):
    write_model_card(trained, {"teacher": "me/teacher", "license": "mit"})
    to_hf_llava(trained, tmp_path / "export")
    card = ModelCard.load(tmp_path / "export" / "README.md")
    assert card.data.library_name == "transformers" and "hf-llava" in card.data.tags
    assert card.data.license == "mit" and "me/teacher" in card.data.base_model
    assert "Exported from `student`" in card.text and "`dbild`" in card.text and "`600`" in card.text
    assert all(place in card.text.split("## Run it")[1] for place in ("image-text-to-text", "vllm", "OpenVINO"))
    from_hf_llava(tmp_path / "export", tmp_path / "returned")
    card = ModelCard.load(tmp_path / "returned" / "README.md")
    assert card.data.library_name == "tinyllava_switchkd" and "me/teacher" in card.data.base_model
    assert "Exported from `export`" in card.text and "`600`" in card.text


def test_the_tag_is_the_methods(trained):
    assert "switch-kd" in ModelCard.load(write_model_card(trained)).data.tags
    tags = ModelCard.load(write_model_card(trained, {"settings": {"distill_method": "llava_kd"}})).data.tags
    assert "llava-kd" in tags and "distillation" in tags and "switch-kd" not in tags


def test_the_card_of_a_gguf_folder_knows_the_bases(trained, tmp_path):
    pytest.importorskip("gguf")
    from tinyllava_switchkd.model.export.gguf import to_gguf

    to_gguf(trained, tmp_path / "export", allow_approximate=True)
    card = ModelCard.load(tmp_path / "export" / "README.md")
    assert card.data.base_model == ["Qwen/Qwen2.5-0.5B", "google/siglip-base"] and card.data.library_name == "gguf"
    assert "# export\n" in card.text and "`qwen2_base`" in card.text and "--mmproj mmproj.gguf" in card.text
    assert "Approximate: llama.cpp's graph uses all" in card.text and "Images: square ones are read" in card.text
    assert "of 4 answers equal the checkpoint's" in card.text


def test_push_to_hub_carries_the_card(trained, tmp_path, monkeypatch):
    from tinyllava_switchkd.model import load_pretrained_model

    write_model_card(trained, {"teacher": "me/teacher"})
    sent = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, *args, **kwargs):
            pass

        def upload_folder(self, repo_id, folder_path, commit_message):
            from pathlib import Path

            sent.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})
            return repo_id

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model, *_ = load_pretrained_model(trained, device="cpu")
    model.push_to_hub("me/student")
    text = sent["README.md"].decode()
    assert "# me/student" in text and "me/teacher" in text and "`dbild`" in text
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= sent.keys()


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("card.json", {"settings": [1]}, "settings is [1], not an object"),
        ("card.json", {"results": [1]}, "results is [1], not an object"),
        ("card.json", {"teacher": ["a"]}, "teacher is ['a'], not text"),
        ("card.json", {"data": 5}, "data is 5, not a name"),
        ("measured.json", {"fp32": 1}, "measured.json was not written by an export"),
        ("config.json", {"tinyllava": [1]}, "tinyllava is [1], not an object"),
    ],
)
def test_wrong_types_are_one_sentence(file, content, said, trained, capsys):
    (trained / file).write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        main([str(trained)])
    assert said in capsys.readouterr().err


def test_odd_but_harmless_values(trained):
    (trained / "card.json").write_text('{"teacher": null, "data": [5]}')
    (trained / "training_args.json").write_text('{"data_path": ["a"], "distill_method": ["x"], "teacher_path": "x"}')
    main([str(trained)])
    text = (trained / "README.md").read_text()
    assert "| data | 5 |" in text and "distilled" in text


def test_a_partial_score_says_so(tmp_path):
    score = {"benchmark": "pope", "score": 100.0, "split": "test", "total": 10, "answered": 4, "missing": 6}
    for extra, told in (
        ({"asked": {"questions": 10, "of": 8910, "limit": 10}}, "first 10 of 8910 questions, 6 missing"),
        ({"asked": {"questions": 3000, "of": 8910}, "missing": 0}, "3000 of 8910 questions"),
        ({"missing": 0, "judge": {"name": "j", "read": 2}}, "some answers read by a judge"),
    ):
        (tmp_path / "pope.json").write_text(json.dumps(score | extra))
        assert read_scores([tmp_path]) == {"pope (test)": f"100.0 ({told})"}


def test_the_command_adds_what_no_file_says(trained, tmp_path, capsys):
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "pope.json").write_text('{"benchmark": "pope", "score": 86.44, "split": "test"}')
    (tmp_path / "scores" / "made.json").write_text('["another"]')
    arguments = ["--license", "apache-2.0", "--teacher", "me/teacher", "--data", "mix665k", "TextCaps"]
    main([str(trained), *arguments, "--results", str(tmp_path / "scores")])
    card = ModelCard.load(trained / "README.md")
    assert card.data.license == "apache-2.0" and "me/teacher" in card.data.base_model
    assert "| pope (test) | 86.4 |" in card.text and "| data | mix665k, TextCaps |" in card.text
    score = {"benchmark": "gqa", "score": 1, "run": {"model_name": "a"}}
    (tmp_path / "a.json").write_text(json.dumps(score))
    (tmp_path / "b.json").write_text(json.dumps({**score, "benchmark": "mme", "run": {"model_name": "b"}}))
    for folder, more, message in (
        (trained, ["--results", str(tmp_path / "a.json"), str(tmp_path / "a.json")], "a second score on gqa"),
        (trained, ["--results", str(tmp_path / "a.json"), str(tmp_path / "b.json")], "different models (a, b)"),
        (trained, ["--results", str(trained)], "holds no scores"),
        (trained, ["--results", str(tmp_path / "none.json")], "does not exist"),
        (tmp_path / "scores", [], "is not a model's folder"),
    ):
        with pytest.raises(SystemExit):
            main([str(folder), *more])
        assert message in capsys.readouterr().err
    for own in (b"# Mine\n", "# Mein Modell\r\n".encode("utf-16")):
        (trained / "README.md").write_bytes(own)
        with pytest.raises(SystemExit):
            main([str(trained), "--license", "mit"])
        assert "stays as it is" in capsys.readouterr().err and (trained / "README.md").read_bytes() == own
