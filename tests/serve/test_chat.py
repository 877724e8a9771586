"""The terminal chat: as a process with standard input, and its parts."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.serve.talkers import picture, talker
from tests.tiny import tiny_tokenizer
from tinyllava_switchkd.model import save_pretrained_model
from tinyllava_switchkd.serve import chat
from tinyllava_switchkd.serve.conversation import Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    model = talker()
    save_pretrained_model(
        model.model, tiny_tokenizer(), model.image_processor, folder / "student", template="qwen2_base"
    )
    picture(1).save(folder / "one.png")
    picture(2).save(folder / "two with a space.png")
    return folder


@pytest.fixture
def session():
    return chat.Chat(talker(), Sampling(max_new_tokens=6))


AS_MODULE = """
import runpy, sys
try:
    runpy.run_module("tinyllava_switchkd.serve.chat", run_name="__main__")
finally:
    unwanted = ("gradio", "deepspeed", "peft", "bitsandbytes", "matplotlib", "datasets")
    print("unwanted:", [name for name in unwanted if name in sys.modules], file=sys.stderr)
"""


def test_a_session_through_stdin(folder):
    """A whole session in a separate process, which must not import training or the web demo."""
    lines = [
        "What is this?",
        f"/image {folder}/nowhere.png",
        f'/image {folder}/one.png "{folder}/two with a space.png"',
        "/dance",
        "/stats",
        "And these?",
        "/clear",
        "",
        "Who are you?",
        "/quit",
        "never asked",
    ]
    options = ["--model_path", str(folder / "student"), "--image", str(folder / "one.png"), "--max_new_tokens", "8"]
    done = subprocess.run(
        [sys.executable, "-c", AS_MODULE, *options, "--device", "cpu"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    out, err = done.stdout.splitlines(), done.stderr
    assert "2 image(s) go with the next question." in out and "A new conversation." in out
    assert len([line for line in out if line]) <= 6 and "never asked" not in done.stdout
    assert "student: 0.1 million parameters on cpu, template qwen2_base, 63 tokens per image" in err
    assert "nowhere.png does not exist" in err and "There is no command /dance; /help lists them." in err
    assert err.count("[cut at --max_new_tokens]") + err.count("first token after") >= 1
    assert "Traceback" not in err and "unwanted: []" in err


def test_answers_are_kept_as_history(session, capsys):
    session.ask("One?")
    session.ask("Two?")
    assert [turn.question for turn in session.conversation.turns] == ["One?", "Two?"]
    assert all(turn.answer for turn in session.conversation.turns)
    assert capsys.readouterr().out == "".join(f"{turn.answer}\n" for turn in session.conversation.turns)


def test_commands(session, folder, capsys):
    assert session.command(f"/image {folder}/one.png")
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist"):
        session.command(f"/image {folder}/one.png {folder}/none.png")
    assert len(session.conversation.pending) == 1  # all or none
    with pytest.raises(ValueError, match="needs the path"):
        session.command("/image")
    with pytest.raises(ValueError, match="is not closed"):
        session.command("/image 'one.png")
    assert session.command("/help") and "/image PATH" in capsys.readouterr().out
    session.ask("One?")
    assert session.command("/clear") and session.conversation.turns == session.conversation.pending == []
    assert not session.command("/quit") and not session.command("/exit")


def test_timings_on_request(session, capsys):
    session.command("/stats")
    session.ask("One?")
    error = capsys.readouterr().err
    assert "cut at --max_new_tokens" in error and "first token after" in error and "6 tokens" in error


def test_ctrl_c_stops_the_answer_but_not_the_chat(capsys):
    session = chat.Chat(talker(seconds_per_token=0.05), Sampling(max_new_tokens=200))
    before, passes = signal.getsignal(signal.SIGINT), []

    def interrupt(*_):
        passes.append(1)
        if len(passes) == 4:  # after three tokens
            signal.raise_signal(signal.SIGINT)

    session.model.model.language_model.register_forward_pre_hook(interrupt)
    session.ask("Tell me everything.")
    assert signal.getsignal(signal.SIGINT) is before
    assert "[stopped]" in capsys.readouterr().err
    assert 0 < len(session.conversation.turns[0].answer) < 150


def test_control_characters_do_not_reach_the_terminal():
    assert chat.printable("a\x1b[31mred\x9b0m\x07\r\nb\tç🦊") == "a[31mred0m\nb\tç🦊"


class TestCommandLine:
    def run(self, folder, *extra, model="student"):
        return chat.main(["--model_path", str(folder / model), "--device", "cpu", "--max_new_tokens", "5", *extra])

    def test_single_question(self, folder, capsys):
        assert self.run(folder, "--image", str(folder / "one.png"), "--question", "What?") == 0
        out = capsys.readouterr().out
        assert out.count("\n") >= 1 and "Loading" not in out
        assert (
            self.run(folder, "--image-file", str(folder / "one.png"), "--question", "What?", "--question", "Why?") == 0
        )
        assert capsys.readouterr().out.startswith(out)  # greedy: the first answer is the same

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            (["--image", "nothing.png", "--question", "What?"], "nothing.png does not exist"),
            (["--question", "What?", "--load-4bit"], "load_4bit"),
            (["--question", "What?", "--load-8bit"], "load_8bit"),
            (["--question", "What?", "--temperature", "-1"], "temperature must be a number from 0 to 5, not -1.0."),
            (["--question", "What?", "--conv_mode", "nonsense"], "nonsense"),
            (["--question", "  "], "The question is empty."),
            (["--question", "What?", "--device", "nonsense"], "--device nonsense cannot be used here"),
        ],
    )
    def test_bad_input_is_one_sentence(self, folder, capsys, extra, message):
        assert self.run(folder, *extra) == 1
        error = capsys.readouterr().err
        assert error.count("error:") == 1 and message in error

    def test_no_such_model(self, folder, capsys):
        assert self.run(folder, "--question", "What?", model="missing") == 1
        assert "missing" in capsys.readouterr().err

    def test_8_and_4_bit_exclude_each_other(self, folder, capsys):
        with pytest.raises(SystemExit):
            self.run(folder, "--load-8bit", "--load-4bit")
        assert "not allowed with" in capsys.readouterr().err

    def test_quantisation_and_dtype_reach_the_loader(self, folder, monkeypatch, capsys):
        seen = {}

        def load(path, name=None, template=None, **kwargs):
            seen.update(kwargs)
            raise ValueError("enough")

        monkeypatch.setattr("tinyllava_switchkd.serve.engine.ChatModel.load", load)
        self.run(folder, "--question", "What?", "--load-4bit", "--attn-implementation", "eager", "--dtype", "bfloat16")
        assert (seen["load_4bit"], seen["load_8bit"], seen["attn_implementation"]) == (True, False, "eager")
        assert str(seen["dtype"]) == "torch.bfloat16"
