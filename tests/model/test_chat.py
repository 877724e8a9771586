"""chat(): the prompt of the template, the images' order, the template's choice."""

import json

import huggingface_hub
import pytest
import torch
from PIL import Image

from tests.model.checkpoints import save
from tests.tiny import VOCAB_SIZE, tiny_llava, tiny_tokenizer
from tinyllava_switchkd.data import ImagePreprocess, TextPreprocess
from tinyllava_switchkd.data.template.base import exchange
from tinyllava_switchkd.eval.generate import Answerer
from tinyllava_switchkd.model import TinyLlavaForConditionalGeneration, load_pretrained_model
from tinyllava_switchkd.model.chat import conversation_template
from tinyllava_switchkd.model.export.hf_llava import generation_config_of
from tinyllava_switchkd.model.layouts import read_config
from tinyllava_switchkd.serve.engine import ChatModel


def picture(seed):
    pixels = torch.randint(0, 255, (30, 40, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def expected(model, messages, images):
    """The expected answer, computed by hand."""
    tokenizer = tiny_tokenizer()
    encoded = TextPreprocess(tokenizer, "qwen2_base")(messages, mode="eval", num_images=len(images))
    preprocess = ImagePreprocess(model.vision_tower.image_processor, model.config)
    pixels = torch.stack([preprocess(image) for image in images]) if images else None
    new = model.generate(encoded["input_ids"][None], images=pixels, max_new_tokens=5, do_sample=False)
    return tokenizer.decode(new[0], skip_special_tokens=True).strip()


def test_question_about_an_image(tmp_path):
    model = tiny_llava(template="qwen2_base")
    tokenizer = tiny_tokenizer()
    image = picture(0)
    messages = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": None}]
    answer = expected(model, messages, [image])
    assert model.chat("What is it?", image, tokenizer, max_new_tokens=5) == answer
    image.save(tmp_path / "image.png")
    model.tokenizer, model.image_processor = tokenizer, model.vision_tower.image_processor
    assert model.chat("What is it?", tmp_path / "image.png", max_new_tokens=5) == answer


def test_history_several_images_and_none():
    model = tiny_llava(template="qwen2_base")
    model.tokenizer = tiny_tokenizer()
    images = [picture(1), picture(2)]
    messages = [
        {"from": "human", "value": "<image>\n<image>\nA?"},
        {"from": "gpt", "value": "B."},
        {"from": "human", "value": "C?"},
        {"from": "gpt", "value": None},
    ]
    answer = model.chat("C?", images, history=[("A?", "B.")], max_new_tokens=5)
    assert answer == expected(model, messages, images)
    messages = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": None}]
    assert model.chat("Hello", max_new_tokens=5) == expected(model, messages, [])


@pytest.mark.parametrize("where", [{"subfolder": "student"}, {"revision": "v2", "token": "hf_x"}], ids=str)
def test_a_loaded_model_reads_the_rest_of_its_own_checkpoint(where, tmp_path, monkeypatch):
    main, own = tmp_path / "main", tmp_path / where.get("subfolder", "v2")
    for folder, mean in ((main, 0.9), (own, 0.5)):
        save(tiny_llava(template="qwen2_base"), folder)
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [mean] * 3}))

    def snapshot_download(name, revision="main", token=None, **kwargs):
        return str(tmp_path if "subfolder" in where else own if (revision, token) == ("v2", "hf_x") else main)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = TinyLlavaForConditionalGeneration.from_pretrained("someone/student", **where)
    model.chat("What?", picture(0), max_new_tokens=1)
    assert list(model.image_processor.image_mean) == [0.5] * 3 and len(model.tokenizer) == VOCAB_SIZE


def test_a_written_placeholder_is_not_counted():
    model, images = tiny_llava(template="qwen2_base"), [picture(1), picture(2)]
    model.tokenizer = tiny_tokenizer()
    first = model.chat("Which?", images, max_new_tokens=5)
    assert model.chat("<image>\n<image>\nWhich?", images, max_new_tokens=5) == first
    history = [("<image>\nHi", "I see an <image>.")]
    for shown, start in ((images, "<image>\n<image>\nHi"), ([], "< image>\nHi")):
        messages = [*exchange(start, history[0][1]), *exchange("What is < image>?")]
        answer = model.chat("What is <image>?", shown, history=history, max_new_tokens=5)
        assert answer == expected(model, messages, shown)


def test_everybody_stops_at_the_same_tokens(tmp_path, monkeypatch):
    """At those of generation_config.json (nothing else of which is read), the tokenizer and the template."""
    save(tiny_llava(), tmp_path, template="qwen2_instruct")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8], "repetition_penalty": 1.3}')
    model, tokenizer, image_processor, _ = load_pretrained_model(tmp_path, device="cpu")
    expected = [7, 8, *tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])]
    assert Answerer.from_pretrained(tmp_path, device="cpu").stop_token_ids == expected
    assert ChatModel(model, tokenizer, image_processor, 512, "tiny").stop_token_ids == expected
    assert generation_config_of(model, tokenizer, "qwen2_instruct", 0, 0).eos_token_id == expected
    answer = model.chat("What?", max_new_tokens=8)
    given = []
    monkeypatch.setattr(model, "generate", lambda ids, **kwargs: given.append(kwargs["eos_token_id"]) or ids[:, :0])
    model.chat("What?")
    assert given == [expected] and len(answer) <= 8
    save(model, tmp_path / "again")
    assert read_config(tmp_path / "again").text_config.eos_token_id == [7, 8]
    assert model.language_model.generation_config.repetition_penalty in (None, 1)


def test_template_of_a_checkpoint_that_names_none():
    base, instruct = tiny_tokenizer("qwen2"), tiny_tokenizer("qwen2_instruct")
    assert conversation_template(tiny_llava(template="chatml"), base) == "chatml"
    assert conversation_template(tiny_llava(), base) == "qwen2_base"
    assert conversation_template(tiny_llava(), instruct) == "qwen2_instruct"
    assert conversation_template(tiny_llava("stablelm"), base) == "phi"
    model = tiny_llava()
    model.config.text_config.__class__.model_type, kept = "other", model.config.text_config.model_type
    try:
        with pytest.raises(ValueError, match="'other'; pass template"):
            conversation_template(model, base)
    finally:
        model.config.text_config.__class__.model_type = kept


def test_bad_input_is_one_sentence(tmp_path):
    model = tiny_llava(template="qwen2_base")
    with pytest.raises(ValueError, match="no tokenizer"):
        model.chat("What?")
    with pytest.raises(FileNotFoundError, match="no image"):
        model.chat("What?", tmp_path / "none.png", tiny_tokenizer())
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png' cannot be read: it is a text"):
        model.chat("What?", tmp_path / "text.png", tiny_tokenizer())
    with pytest.raises(ValueError, match="a path, not a bytes"):
        model.chat("What?", b"png", tiny_tokenizer())


def test_a_photo_is_turned_as_its_camera_noted(tmp_path):
    model = tiny_llava(template="qwen2_base")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture(3).save(tmp_path / "phone.png", exif=exif)
    upright = picture(3).transpose(Image.Transpose.ROTATE_270)
    seen = []
    model.vision_tower.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for image in (tmp_path / "phone.png", Image.open(tmp_path / "phone.png"), upright, picture(3)):
        model.chat("What?", image, tiny_tokenizer(), max_new_tokens=1)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[2]) and not torch.allclose(seen[2], seen[3])
