"""Batches give the same answers as one question at a time, and nothing is computed twice."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.eval.miniature import legible_model, picture
from tests.tiny import tiny_llava, tiny_text_config, tiny_tokenizer
from tinyllava_switchkd.constants import IMAGE_TOKEN_INDEX
from tinyllava_switchkd.eval.batches import Prefetched, batches_of, in_order, tasks_of
from tinyllava_switchkd.eval.benchmarks import Question
from tinyllava_switchkd.eval.generate import Answerer
from tinyllava_switchkd.eval.guesses import Guesses
from tinyllava_switchkd.eval.prefix import SharedPrefix, attends_to_all
from tinyllava_switchkd.model.chat import stop_token_ids

WORDS = ["what", "is", "the", "very", "small", "red", "thing", "on", "a", "table", "behind", "them", "called"]


def make_answerer(dtype: torch.dtype = torch.float32, seed: int = 0) -> Answerer:
    model = legible_model(seed).to(dtype)
    return Answerer(model, tiny_tokenizer("phi"), model.vision_tower.image_processor, "phi")


def mixed_prompts(answerer: Answerer, count: int, seed: int = 0):
    """Prompts of very different lengths, with one image, none or two: ids [T], visual tokens [n, K, D] or None."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    prompts, images = [], []
    for number in range(count):
        num_images = (1, 0, 1, 2)[number % 4]
        text = " ".join(draw.choices(WORDS, k=draw.choice((1, 3, 9, 40)))) + "?"
        prompts.append(answerer.prompt_ids(text, num_images))
        pixels = torch.randn(num_images, 3, 28, 28, generator=generator)
        images.append(answerer.encode_images(pixels) if num_images else None)
    return prompts, images


@pytest.mark.parametrize(("dtype", "seed"), [(torch.float32, 0), (torch.float32, 1), (torch.float64, 0)])
def test_a_batch_answers_token_for_token_like_single_questions(dtype, seed):
    answerer = make_answerer(dtype, seed)
    answerer.stop_token_ids += tuple(answerer.tokenizer("abcdefgh").input_ids)  # more ways to end early
    prompts, images = mixed_prompts(answerer, 24, seed)
    alone = [answerer.answer_ids([prompt], [visual], 20)[0] for prompt, visual in zip(prompts, images, strict=True)]
    # Otherwise the comparison would mean nothing:
    assert len({tuple(ids) for ids in alone}) >= 8
    assert len({len(ids) for ids in alone}) >= 4
    for size in (2, 7, 24):
        starts = range(0, 24, size)
        parts = [answerer.answer_ids(prompts[at : at + size], images[at : at + size], 20) for at in starts]
        assert [ids for part in parts for ids in part] == alone


@pytest.mark.parametrize("llm", ["qwen2", "qwen3", "llama", "gemma", "phi3", "stablelm"])
def test_every_language_model_supports_padding_and_shared_pictures(llm):
    model = tiny_llava(llm, text={"eos_token_id": 256, "initializer_range": 0.3}).double()
    answerer = Answerer(model, tiny_tokenizer("qwen2"), model.vision_tower.image_processor, "qwen2_base")
    for prompts, images in (mixed_prompts(answerer, 6), shared_pictures(answerer, 9, 2)):
        alone = [answerer.answer_ids([prompt], [visual], 8)[0] for prompt, visual in zip(prompts, images, strict=True)]
        assert len({tuple(ids) for ids in alone}) >= 3
        assert answerer.answer_ids(prompts, images, 8) == alone


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_batch_does_not_change_positions_that_depend_on_the_length(kind):
    if kind == "longrope":
        rope = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 200}
        text = {"original_max_position_embeddings": 200, "max_position_embeddings": 1024, "head_dim": 8}
    else:
        rope, text = {"factor": 4.0}, {"max_position_embeddings": 200}
    text |= {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **rope}, "sliding_window": None}
    text |= {"eos_token_id": 256, "initializer_range": 0.3}
    model = tiny_llava("phi3" if kind == "longrope" else "llama", text=text).double()
    answerer = Answerer(model, tiny_tokenizer("qwen2"), model.vision_tower.image_processor, "qwen2_base")
    for prompts, images in (mixed_prompts(answerer, 6), shared_pictures(answerer, 5, 2)):
        alone = [answerer.answer_ids([prompt], [visual], 4)[0] for prompt, visual in zip(prompts, images, strict=True)]
        answerer.guesses = Guesses()
        answerer.guesses.learn([ids[:1] for ids in alone])
        assert answerer.answer_ids(prompts, images, 4) == alone
        assert answerer.answer_ids(prompts[::-1], images[::-1], 4) == alone[::-1]
        answerer.guesses = None


def shared_pictures(answerer: Answerer, count: int, pictures: int):
    """Prompts of very different lengths that take turns with a few pictures."""
    prompts, _ = mixed_prompts(answerer, 4 * count)
    pixels = 4 * torch.randn(pictures, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    visual = answerer.encode_images(pixels).split(1)
    return prompts[::4], [visual[number % pictures] for number in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_prefix_is_computed_once_per_picture(dtype, monkeypatch):
    answerer = make_answerer(dtype)
    prompts, images = shared_pictures(answerer, 16, 3)
    alone = [answerer.answer_ids([prompt], [visual], 16)[0] for prompt, visual in zip(prompts, images, strict=True)]
    assert len({tuple(ids) for ids in alone}) >= 5
    positions = []  # of the language model, in each call: rows times columns
    decoder = answerer.model.language_model.get_decoder()
    decoder.register_forward_pre_hook(
        lambda _, args, kwargs: (
            positions.append(kwargs["inputs_embeds"].shape[:2].numel())
            if kwargs.get("inputs_embeds") is not None
            else None
        ),
        with_kwargs=True,
    )
    assert answerer.answer_ids(prompts, images, 16) == alone
    head = int((prompts[0] == IMAGE_TOKEN_INDEX).nonzero()[0])
    width = max(len(prompt) - head - 1 for prompt in prompts)
    assert positions[:2] == [3 * (head + images[0].shape[1]), 16 * width]
    positions.clear()
    assert answerer.answer_ids(prompts[:3], images[:3], 16) == alone[:3]  # different pictures: nothing to share
    assert positions[0] > 3 * (head + images[0].shape[1])


def test_when_the_prefix_is_not_shared():
    answerer = make_answerer()
    prompts, images = shared_pictures(answerer, 4, 2)
    config = answerer.model.config.text_config

    def shared(prompts=prompts, images=images, config=config, new_tokens=8):
        return SharedPrefix.of(prompts, images, config, new_tokens)

    assert shared().picture_of_row.tolist() == [0, 1, 0, 1]
    assert shared(images=[None, *images[1:]]) is None  # text-only
    assert shared(images=[torch.cat([images[0], images[1]]), *images[1:]]) is None  # two pictures
    assert shared(images=[visual.clone() for visual in images]) is None  # nothing in common
    assert shared(prompts=[prompts[0][1:], *prompts[1:]]) is None  # other words before the picture
    window = tiny_text_config("phi3", sliding_window=64)
    assert shared(config=window) is None
    assert attends_to_all(window, 64)
    assert not attends_to_all(window, 65)
    assert not attends_to_all(tiny_text_config("qwen2", layer_types=["linear_attention"] * 2), 8)
    beams = answerer.answer(prompts, images, 8, num_beams=2)
    assert len(beams) == 4


def test_text_only_batch_and_order_of_rows():
    answerer = make_answerer()
    prompts = [answerer.prompt_ids(text, 0) for text in ("a?", "a much longer question, is it not?", "b c?")]
    forward = answerer.answer(prompts, [None] * 3, 12)
    assert answerer.answer(prompts[::-1], [None] * 3, 12) == forward[::-1]


def test_answers_depend_on_the_image():
    answerer = make_answerer()
    prompt = answerer.prompt_ids("what is it?")
    visual = answerer.encode_images(4 * torch.randn(12, 3, 28, 28, generator=torch.Generator().manual_seed(0)))
    assert len(set(answerer.answer([prompt] * 12, list(visual.split(1)), 12))) > 1


def test_greedy_whatever_the_generation_config_says():
    answerer = make_answerer()
    prompts, images = mixed_prompts(answerer, 8)
    plain = answerer.answer(prompts, images, 20)
    config = answerer.model.language_model.generation_config
    config.update(do_sample=True, temperature=2.0, repetition_penalty=3.0, no_repeat_ngram_size=1, min_new_tokens=9)
    assert answerer.answer(prompts, images, 20) == plain
    assert answerer.model.language_model.generation_config is config  # and it is left as it was


def test_memory_that_runs_out_halves_the_batch(monkeypatch, caplog):
    answerer = make_answerer()
    prompts, images = mixed_prompts(answerer, 16)
    expected = answerer.answer(prompts, images, 8)
    sizes = []

    def generate(inputs, **kwargs):
        sizes.append(len(inputs))
        if len(inputs) > 5:
            raise torch.OutOfMemoryError
        return type(answerer.model).generate(answerer.model, inputs, **kwargs)

    monkeypatch.setattr(answerer.model, "generate", generate)
    assert answerer.answer(prompts, images, 8) == expected
    assert sizes == [16, 8, 4, 4, 4, 4]
    assert answerer.batch_limit == 4
    assert "16 rows do not fit into memory" in caplog.text
    monkeypatch.setattr(answerer.model, "generate", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        answerer.answer(prompts[:1], images[:1], 8)


def test_stop_tokens_of_an_answer():
    model = tiny_llava(text={"eos_token_id": 257})
    tokenizer = tiny_tokenizer("qwen2")
    ids = stop_token_ids(model, tokenizer, "qwen2_instruct")
    names = [tokenizer.convert_ids_to_tokens(token) for token in ids]
    assert names == ["<|im_start|>", "<|endoftext|>", "<|im_end|>"]  # the model's, the tokenizer's, the template's


# ------------------------------------------------------------------------------------------------------- the order


def questions_about(images: dict[str, list[str]], folder: Path = Path("x")) -> list[Question]:
    """Questions that take turns with the images; "" means no image."""
    longest = max(map(len, images.values()))
    turns = [
        (name, prompts[turn]) for turn in range(longest) for name, prompts in images.items() if turn < len(prompts)
    ]
    return [Question(number, prompt, folder / name if name else None) for number, (name, prompt) in enumerate(turns)]


def test_equal_pairs_become_one_task():
    questions = questions_about({"a": ["p", "q", "p"], "b": ["p"], "": ["p", "p"]})
    tasks = tasks_of(questions)
    assert [(task.image_key, task.prompt, len(task.questions)) for task in tasks] == [
        ("x/a", "p", 2),
        ("x/b", "p", 1),
        (None, "p", 2),
        ("x/a", "q", 1),
    ]
    assert sorted(question.question_id for task in tasks for question in task.questions) == list(range(6))


def test_images_stay_together_and_the_longest_come_first():
    questions = questions_about({"a": ["1", "333"], "b": ["22", "55555"], "": ["7777777", "9"]})
    ordered = in_order(tasks_of(questions))
    assert [(task.image_key, task.prompt) for task in ordered] == [
        ("x/b", "55555"),
        ("x/b", "22"),
        ("x/a", "333"),
        ("x/a", "1"),
        (None, "7777777"),
        (None, "9"),
    ]


@pytest.mark.parametrize("shards", [1, 2, 3, 8, 50])
def test_shards_share_all_tasks_without_sharing_an_image(shards):
    names = {f"{number}.png": ["a" * (number % 5 + 1), "b" * number] for number in range(1, 12)} | {"": ["x", "y"]}
    tasks = tasks_of(questions_about(names))
    shares = [in_order(tasks, shard, shards) for shard in range(shards)]
    assert sorted(map(id, tasks)) == sorted(id(task) for share in shares for task in share)
    images = [{task.image_key for task in share} - {None} for share in shares]
    assert sum(map(len, images)) == 11
    assert max(map(len, images)) - min(map(len, images)) <= 1


def test_each_image_is_loaded_in_its_first_batch_and_dropped_after_its_last():
    tasks = in_order(tasks_of(questions_about({"a": list("123456"), "b": list("12"), "c": list("1"), "": list("12")})))
    batches = batches_of(tasks, 4)
    assert [sorted(batch.load) for batch in batches] == [["x/a"], ["x/b"], ["x/c"]]
    assert [sorted(batch.drop) for batch in batches] == [[], ["x/a", "x/b"], ["x/c"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_prepare_the_batches_in_order(workers, tmp_path):
    for number in range(3):
        picture(tmp_path / f"{number}.png", number)
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:-200])
    names = [*(f"{number}.png" for number in range(3)), "broken.png", "cut.png", "absent.png"]
    batches = batches_of(in_order(tasks_of(questions_about({name: ["p", "longer"] for name in names}, tmp_path))), 3)
    answerer = make_answerer()
    prepared = list(Prefetched(batches, answerer.prompt_ids, answerer.pixels_of).loader(workers))
    assert [len(item.prompts) for item in prepared] == [3, 3, 3, 3]
    read = {Path(key).name: pixels for item in prepared for key, pixels in item.pixels.items()}
    bad = {Path(key).name: reason for item in prepared for key, reason in item.unreadable.items()}
    assert sorted(read) == names[:3]
    assert sorted(bad) == ["absent.png", "broken.png", "cut.png"]
    with Image.open(tmp_path / "1.png") as image:
        torch.testing.assert_close(read["1.png"][0], answerer.pixels_of(image), rtol=0, atol=0)
