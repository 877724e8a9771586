"""The engine: prompts, streaming, stopping, timings, and separate conversations."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from tests.serve.talkers import CONTEXT, picture, talker
from tests.tiny import tiny_llava, tiny_tokenizer
from tinyllava_switchkd.data import ImagePreprocess, TextPreprocess
from tinyllava_switchkd.model import save_pretrained_model
from tinyllava_switchkd.registry import display_names
from tinyllava_switchkd.serve.conversation import Conversation, Sampling
from tinyllava_switchkd.serve.engine import ChatModel

SHORT = Sampling(max_new_tokens=12)


def finish(stream):
    """All replies of a stream."""
    return list(stream)


def ask(model, question, *images, conversation=None, sampling=SHORT):
    conversation = conversation or Conversation()
    for image in images:
        conversation.attach(image)
    return finish(model.stream(conversation, question, sampling))[-1]


@pytest.fixture(scope="module")
def model():
    return talker()


class TestStream:
    def test_stream_equals_generate(self, model):
        image = picture()
        reply = ask(model, "What is it?", image)
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": None}]
        ids = TextPreprocess(model.tokenizer, "qwen2_base")(turns, mode="eval", num_images=1)["input_ids"][None]
        pixels = ImagePreprocess(model.image_processor, model.model.config)(image)[None]
        expected = model.model.generate(ids, images=pixels, max_new_tokens=12, do_sample=False)[0]
        assert reply.token_ids == tuple(expected.tolist())
        assert reply.prompt_ids.tolist() == ids[0].tolist()
        assert reply.text == model.tokenizer.decode(expected).strip()

    def test_text_grows_to_the_whole_answer(self, model):
        replies = finish(model.stream(Conversation(), "Tell me.", SHORT))
        assert len(replies) >= 12
        for before, after in itertools.pairwise(replies):
            assert after.text.startswith(before.text) and len(after.token_ids) >= len(before.token_ids)
        assert [reply.finish for reply in replies[:-1]] == [None] * (len(replies) - 1)
        assert replies[-1].finish == "length"

    def test_timings(self):
        replies = finish(talker(seconds_per_token=0.05).stream(Conversation(), "Tell me.", SHORT))
        assert replies[0].first_token >= 0.05 and replies[0].rate is None
        assert 2 < replies[-1].rate < 20  # a little over 50 ms per token
        assert len({reply.first_token for reply in replies}) == 1

    def test_history_is_kept(self, model):
        conversation = Conversation()
        first = ask(model, "One?", picture(1), conversation=conversation)
        second = ask(model, "Two?", picture(2), conversation=conversation)
        prompt = model.tokenizer.decode([i for i in second.prompt_ids.tolist() if i >= 0])
        assert f"One? ASSISTANT: {first.text}<|endoftext|>USER:" in prompt and prompt.endswith("Two? ASSISTANT:")
        assert (second.prompt_ids == -200).sum() == 2 and len(second.images) == 2
        assert [turn.question for turn in conversation.turns] == ["One?", "Two?"]
        assert conversation.pending == []
        assert second.text != ask(model, "Two?", picture(2)).text  # so the history was read

    def test_a_typed_placeholder_is_text(self, model):
        reply = ask(model, "What does <image> mean, or <ima<image>ge>?", picture())
        assert (reply.prompt_ids == -200).sum() == 1
        assert (ask(model, "What does <image> mean?").prompt_ids == -200).sum() == 0

    def test_ends_at_the_end_token(self):
        model = talker()
        model.stop_token_ids.append(ask(model, "Well?").token_ids[4])
        reply = ask(model, "Well?")
        assert reply.finish == "end" and len(reply.token_ids) <= 5

    def test_sampling(self, model):
        torch.manual_seed(0)
        texts = {ask(model, "Well?", sampling=Sampling(1.5, max_new_tokens=12)).text for _ in range(3)}
        assert len(texts) > 1
        narrow = Sampling(1.5, top_k=1, max_new_tokens=12)
        assert ask(model, "Well?", sampling=narrow).token_ids == ask(model, "Well?").token_ids

    @pytest.mark.parametrize(
        "bad", [{"temperature": -1}, {"top_p": 0}, {"top_k": -2}, {"max_new_tokens": 0}, {"repetition_penalty": "x"}]
    )
    def test_sampling_out_of_range(self, bad):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Sampling(**bad)

    def test_refusals(self, model):
        with pytest.raises(ValueError, match="empty"):
            ask(model, "  \n ")
        conversation = Conversation()
        with pytest.raises(ValueError, match=f"at most {CONTEXT}; start a new conversation"):
            ask(model, "Hm " * CONTEXT, conversation=conversation)
        with pytest.raises(ValueError, match=r"10 image\(s\)"):
            ask(model, "What?", *map(picture, range(10)))

    def test_an_answer_fits_the_context(self, model):
        reply = ask(model, "W" * 300, sampling=Sampling(max_new_tokens=CONTEXT))
        assert reply.finish == "length" and len(reply.token_ids) + len(reply.prompt_ids) == CONTEXT

    def test_errors_of_the_model_are_raised_by_the_stream(self, monkeypatch):
        model = talker()

        def fail(*args, **kwargs):
            raise RuntimeError("broken")

        monkeypatch.setattr(model.model, "generate", fail)
        with pytest.raises(RuntimeError, match="broken"):
            ask(model, "What?")
        monkeypatch.undo()
        assert ask(model, "What?").finish == "length"  # and the lock is released

    def test_features_are_kept_for_follow_ups(self, model, monkeypatch):
        encoded = []
        original = model.model.encode_images
        monkeypatch.setattr(model.model, "encode_images", lambda x: (encoded.append(x), original(x))[1])
        conversation = Conversation()
        ask(model, "One?", picture(77), conversation=conversation)
        ask(model, "Two?", conversation=conversation)
        assert len(encoded) == 1
        for seed in range(100, 110):
            ask(model, "One?", picture(seed))
        ask(model, "One?", picture(77))
        assert len(encoded) == 12  # no longer cached


class TestStop:
    def test_stop_event(self):
        model, stop, conversation = talker(seconds_per_token=0.02), threading.Event(), Conversation()
        for reply in model.stream(conversation, "Tell me.", Sampling(max_new_tokens=200), stop):
            if len(reply.token_ids) == 5:
                stop.set()
        assert reply.finish == "stopped" and 5 <= len(reply.token_ids) < 20
        assert conversation.turns[0].answer == reply.text

    def test_stopped_before_the_first_word(self, model):
        stop, conversation = threading.Event(), Conversation()
        stop.set()
        conversation.attach(picture())
        busy = threading.Event()
        with model._lock:  # another request is being answered
            stream = model.stream(conversation, "Tell me.", SHORT, stop)
            replies = []
            waiter = threading.Thread(target=lambda: (replies.extend(stream), busy.set()))
            waiter.start()
            assert busy.wait(5)
        assert replies[-1].finish == "stopped" and replies[-1].token_ids == ()
        assert conversation.turns == [] and len(conversation.pending) == 1

    def test_time_limit(self):
        model = talker(seconds_per_token=0.02)
        reply = finish(model.stream(Conversation(), "Go.", Sampling(max_new_tokens=300), time_limit=0.6))[-1]
        assert reply.finish == "time" and 0 < len(reply.token_ids) < 40  # of 300, each of at least 0.02 s

    def test_closing_the_iterator_stops_the_work(self):
        model = talker(seconds_per_token=0.02)
        conversation = Conversation()
        stream = model.stream(conversation, "Go.", Sampling(max_new_tokens=300))
        next(stream)
        stream.close()
        assert model._lock.acquire(timeout=4)  # 300 tokens would take 6 s
        model._lock.release()
        assert conversation.turns == []


def test_users_in_threads_do_not_mix(model):
    """Six users, each with an image, ask two questions at the same time; each gets the same answers as alone."""

    def talk(user: int) -> list[str]:
        conversation = Conversation()
        conversation.attach(picture(user))
        answers = []
        for question in (f"I am {user}, what is it?", f"User {user} asks again."):
            answers.append(finish(model.stream(conversation, question, SHORT))[-1].text)
        return answers

    alone = [talk(user) for user in range(6)]
    assert len({tuple(answers) for answers in alone}) == 6
    together: dict[int, list[str]] = {}
    threads = [threading.Thread(target=lambda user=user: together.update({user: talk(user)})) for user in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[user] for user in range(6)] == alone


def test_attention_and_answers_at_the_same_time(model):
    reply = ask(model, "What?", picture(3))
    expected = model.attend(reply)
    assert expected.weights.shape == (len(expected.tokens), 1, 8, 8)
    maps, texts = [], []
    threads = [threading.Thread(target=lambda: maps.append(model.attend(reply))) for _ in range(3)]
    threads += [threading.Thread(target=lambda: texts.append(ask(model, "What?", picture(3)).text)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [reply.text] * 3
    assert all((found.weights[..., 1:, :] == expected.weights[..., 1:, :]).all() for found in maps)
    with pytest.raises(ValueError, match="no image"):
        model.attend(ask(model, "What?"))


class TestLoad:
    def test_from_a_folder(self, tmp_path):
        made = tiny_llava()
        save_pretrained_model(made, tiny_tokenizer(), made.vision_tower.image_processor, tmp_path / "mine")
        assert ChatModel.load(str(tmp_path / "mine"), device="cpu").template == "qwen2_base"  # of its language model
        model = ChatModel.load(str(tmp_path / "mine"), device="cpu", template="phi")
        assert (model.name, model.template, model.context_len) == ("mine", "phi", 512)
        assert model.num_parameters == sum(parameter.numel() for parameter in made.parameters())
        assert ask(model, "Hello?", picture()).finish in ("length", "end")

    @pytest.mark.parametrize(
        ("paths", "names"),
        [
            (["/models/Student/"], ["Student"]),
            (["a/x", "b/x", "b/y"], ["a/x", "b/x", "b/y"]),
            (["same", "./same"], ["same (1)", "same (2)"]),
            (["org/Model-A", "org/Model-B"], ["Model-A", "Model-B"]),
            (["."], ["."]),
        ],
    )
    def test_names(self, paths, names):
        assert display_names(paths) == names
