"""Exports: transformers' LLaVA computes the same as TinyLLaVA, and the conversion back is exact."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    pipeline,
)

from tests.data import tokenizers
from tests.model.checkpoints import write_v1_split
from tests.tiny import VOCAB_SIZE, tiny_llava, tiny_tokenizer
from tinyllava_switchkd.data import ImagePreprocess, TemplateFactory, TextPreprocess, register_template
from tinyllava_switchkd.data.template.base import EmptyFormatter
from tinyllava_switchkd.data.template.conversations import PhiTemplate
from tinyllava_switchkd.model import load_pretrained_model, save_pretrained_model
from tinyllava_switchkd.model.export import from_hf_llava, jinja_template, to_hf_llava, verify_export
from tinyllava_switchkd.model.export.__main__ import main
from tinyllava_switchkd.model.export.chat_template import PROBES, messages_of, template_behind
from tinyllava_switchkd.model.export.files import whole_folder
from tinyllava_switchkd.model.export.questions import read_questions

FIXTURES = Path(__file__).parents[1] / "fixtures"
UPSTREAM = FIXTURES / "upstream"


def picture(width=50, height=30, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write(folder, llm="qwen2", tower="siglip", connector="mlp2x_gelu", template="qwen2_base", style=None, **kwargs):
    """A tiny TinyLLaVA on disk, its language model stopping at its tokenizer's end token."""
    tokenizer = tiny_tokenizer(style or (llm if llm in ("llama", "gemma") else "qwen2"))
    text = {"eos_token_id": tokenizer.eos_token_id, **kwargs.pop("text", {})}
    model = tiny_llava(llm, tower, connector, text=text, **kwargs)
    save_pretrained_model(model, tokenizer, model.vision_tower.image_processor, folder, template=template)
    return folder


def ask_ours(folder, question, image, template, dtype=None):
    """(model, prompt with -200, pixels) of a TinyLLaVA checkpoint."""
    model, tokenizer, image_processor, _ = load_pretrained_model(folder, device="cpu", dtype=dtype)
    messages = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": None}]
    prompt = TextPreprocess(tokenizer, template)(messages, mode="eval")["input_ids"][None]
    return model, prompt, ImagePreprocess(image_processor, model.config)(image)[None]


def ask_theirs(folder, question, image):
    """(model, inputs) of an export, made as its users would."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    assert type(model) is LlavaForConditionalGeneration and type(processor) is LlavaProcessor
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return model.eval(), inputs


def expand(prompt, image_token, count):
    times = torch.where(prompt[0] == -200, count, 1)
    return torch.where(prompt[0] == -200, image_token, prompt[0]).repeat_interleave(times)[None]


CASES = {
    "qwen2, tied head, SigLIP": ({}, 15),
    "llama, own head, CLIP, pad": (
        {"llm": "llama", "tower": "clip", "template": "llama", "image_aspect_ratio": "pad"},
        16,
    ),
    "linear connector, SigLIP, pad": ({"connector": "linear", "image_aspect_ratio": "pad"}, 15),
    "mlp1x, CLIP with its class token": (
        {"tower": "clip", "connector": "mlp1x_gelu", "vision_feature_select_strategy": "cls_patch"},
        17,
    ),
    "every patch of SigLIP, last layer": (
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "cls_patch"},
        16,
    ),
    "qwen3, ChatML": ({"llm": "qwen3", "template": "chatml", "style": "qwen2_instruct"}, 15),
    "stablelm": ({"llm": "stablelm", "template": "phi"}, 15),
    "phi3, untied": ({"llm": "phi3", "template": "phi", "text": {"tie_word_embeddings": False}}, 15),
    "the real grid of 27 x 27": ({"vision": {"image_size": 384, "patch_size": 14}}, 728),
}


@pytest.mark.parametrize("case", CASES)
def test_same_prompt_logits_and_text(case, tmp_path):
    arguments, num_image_tokens = CASES[case]
    template = arguments.get("template", "qwen2_base")
    write(tmp_path / "ours", **arguments)
    to_hf_llava(tmp_path / "ours", tmp_path / "theirs")
    image = picture()
    ours, prompt, pixels = ask_ours(tmp_path / "ours", " What is this?\n", image, template)
    theirs, inputs = ask_theirs(tmp_path / "theirs", " What is this?\n", image)

    assert ours.num_image_tokens == num_image_tokens == theirs.config.image_seq_length
    expanded = expand(prompt, theirs.config.image_token_index, num_image_tokens)
    assert torch.equal(inputs["input_ids"], expanded)
    assert torch.allclose(inputs["pixel_values"], pixels, atol=1e-6)
    with torch.no_grad():
        expected, logits = ours(prompt, images=pixels).logits, theirs(**inputs).logits
    assert (logits[..., :VOCAB_SIZE] - expected).abs().max() < 1e-4
    answer = ours.generate(prompt, images=pixels, max_new_tokens=12, do_sample=False)
    generated = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)[:, expanded.shape[1] :]
    assert torch.equal(answer, generated)


@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_against_tinyllava_v1_itself(tower, tmp_path):
    """A checkpoint that v1 wrote, exported: the logits and the greedy tokens that v1 recorded."""
    name = f"ckpt_{tower}_patch"
    to_hf_llava(UPSTREAM / name, tmp_path / "theirs", template="qwen2_base")
    stored = np.load(UPSTREAM / f"{name}_expect.npz")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "theirs").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "theirs", backend="pil")
    image = Image.open(UPSTREAM / "image.png")
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    assert np.allclose(pixels[0], stored["pixel_values"], atol=1e-6)
    ids, prompt = (
        expand(torch.tensor(stored[key])[None], model.config.image_token_index, model.config.image_seq_length)
        for key in ("input_ids", "prompt_ids")
    )
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits[0]
    assert np.abs(logits.numpy() - stored["logits"]).max() < 1e-4
    # v1's tiny model knows no end token; ours stops at the template's, which must not cut this comparison short
    new = model.generate(input_ids=prompt, pixel_values=pixels, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert new[0, prompt.shape[1] :].tolist() == stored["gen"].tolist()


def test_pipeline_and_batches(tmp_path):
    """transformers' pipeline, and a batch of prompts with different lengths."""
    write(tmp_path / "ours", connector="linear")
    to_hf_llava(tmp_path / "ours", tmp_path / "theirs")
    ours, *_ = load_pretrained_model(tmp_path / "ours", device="cpu")
    image = picture(28, 28)  # of the tower's size: nothing is resampled, so every backend makes the same pixels
    expected = ours.chat("What is it?", image, max_new_tokens=8)
    ask = pipeline("image-text-to-text", model=str(tmp_path / "theirs"), device="cpu")
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]}
    ]
    answer = ask(text=messages, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
    assert answer.strip() == expected

    questions = ["What is it?", "A much longer question, which makes the other row's padding necessary?"]
    texts = [
        ask.processor.apply_chat_template(
            [{"role": "user", "content": f"<image>\n{question}"}], add_generation_prompt=True, tokenize=False
        )
        for question in questions
    ]
    batch = ask.processor(images=[image, image], text=texts, padding=True, return_tensors="pt")
    rows = ask.model.generate(**batch, max_new_tokens=8)[:, batch["input_ids"].shape[1] :]
    answers = ask.processor.batch_decode(rows, skip_special_tokens=True)
    assert [text.strip() for text in answers] == [ours.chat(q, image, max_new_tokens=8) for q in questions]


# conversations


def with_image_token(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@pytest.mark.parametrize(
    ("version", "make"),
    [
        ("qwen2_base", tokenizers.qwen2),
        ("phi", tokenizers.qwen2),
        ("qwen2_instruct", lambda: tokenizers.qwen2("<|im_end|>")),
        ("chatml", lambda: tokenizers.qwen2("<|im_end|>", tokenizers.QWEN2_CHAT_TEMPLATE)),
        ("llama", lambda: tokenizers.llama(legacy=True)),
        ("llama", lambda: tokenizers.llama(legacy=False)),
        ("gemma", tokenizers.gemma),
    ],
)
def test_chat_template_gives_the_ids_of_training(version, make):
    """Compared with `TextPreprocess`, image marks and BOS token included, for every kind of tokenizer."""
    plain, tokenizer = make(), with_image_token(make())
    jinja = jinja_template(version, tokenizer)
    image = tokenizer.convert_tokens_to_ids("<image>")
    for turns in PROBES:
        messages = [
            {"from": who, "value": text}
            for question, answer in turns
            for who, text in (("human", question), ("gpt", answer))
        ]
        expected = TextPreprocess(plain, version)(messages, mode="eval")["input_ids"]
        ids = tokenizer.apply_chat_template(
            messages_of(turns), chat_template=jinja, add_generation_prompt=turns[-1][1] is None, return_dict=False
        )
        assert ids == torch.where(expected == -200, image, expected).tolist()
    assert TemplateFactory(template_behind(jinja, tokenizer)) is TemplateFactory(version)


def test_a_template_with_other_than_ascii_characters():
    system = EmptyFormatter(slot='A robot \U0001f916 says "höflich" {{x}} {% y %}\u2028. ')
    tokenizer = with_image_token(tiny_tokenizer("phi"))
    with TemplateFactory.scope():
        register_template("robot")(lambda: PhiTemplate(system=system))
        jinja = jinja_template("robot", tokenizer)
    text = tokenizer.apply_chat_template(
        messages_of([("Hi", None)]), chat_template=jinja, tokenize=False, add_generation_prompt=True
    )
    assert text == f"{system.apply()}USER: Hi ASSISTANT:"


def test_chat_template_writes_v1s_text():
    """The strings recorded from v1, with the image given as text, as a part, and after the question."""
    tokenizer = with_image_token(tiny_tokenizer())
    jinja = jinja_template("qwen2_base", tokenizer)

    def render(*messages, **kwargs):
        kwargs = {"chat_template": jinja, "tokenize": False, "add_generation_prompt": True, **kwargs}
        return tokenizer.apply_chat_template(list(messages), **kwargs)

    recorded = [case for case in json.loads((FIXTURES / "v1" / "templates.json").read_text()) if "prompt" in case]
    for case in recorded:
        roles = {"human": "user", "gpt": "assistant"}
        turns = [{"role": roles[m["from"]], "content": m["value"]} for m in case["messages"] if m["value"] is not None]
        assert render(*turns) == case["prompt"]
    system = TemplateFactory("qwen2_base")().system.apply()
    text, image = {"type": "text", "text": " What? "}, {"type": "image"}
    for content in ([image, text], [text, image], "<image>\nWhat?", "What?\n<image>"):
        assert render({"role": "user", "content": content}) == f"{system}USER: <image>\nWhat? ASSISTANT:"
    answer = {"role": "assistant", "content": [{"type": "text", "text": "That."}]}
    assert render({"role": "user", "content": [image]}, answer, add_generation_prompt=False) == (
        f"{system}USER: <image> ASSISTANT: That.<|endoftext|>"
    )
    system_message = {"role": "system", "content": "Be brief."}
    assert render(system_message, {"role": "user", "content": "Hi"}) == "Be brief. USER: Hi ASSISTANT:"
    with pytest.raises(Exception, match="not tool"):
        render({"role": "tool", "content": "x"})


def test_generation_stops_where_the_template_ends_an_answer(tmp_path):
    """At the language model's end token and at the template's, which are the same in a correct checkpoint."""
    write(tmp_path / "base", text={"eos_token_id": None})
    to_hf_llava(tmp_path / "base", tmp_path / "a")
    stops = json.loads((tmp_path / "a" / "generation_config.json").read_text())
    assert stops["eos_token_id"] == [tiny_tokenizer().convert_tokens_to_ids("<|endoftext|>")]
    write(tmp_path / "instruct", style="qwen2_instruct", template="qwen2_instruct")
    to_hf_llava(tmp_path / "instruct", tmp_path / "b")
    stops = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert stops["eos_token_id"] == [tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")]
    assert stops["pad_token_id"] == tiny_tokenizer().convert_tokens_to_ids("<|endoftext|>")


# the row of <image>


@pytest.mark.parametrize("llm", ["qwen2", "llama"])
def test_a_new_row_is_never_chosen_and_a_spare_one_is_left_alone(llm, tmp_path):
    template = {"qwen2": "qwen2_base"}.get(llm, llm)
    write(tmp_path / "full", llm, template=template)
    to_hf_llava(tmp_path / "full", tmp_path / "a")
    theirs, inputs = ask_theirs(tmp_path / "a", "What?", picture())
    assert theirs.config.image_token_index == VOCAB_SIZE == theirs.config.text_config.vocab_size - 1
    with torch.no_grad():
        logits = theirs(**inputs).logits
    assert torch.allclose(logits[..., -1], logits[..., :-1].mean(-1), atol=1e-5)
    assert theirs.generation_config.suppress_tokens == [VOCAB_SIZE]

    write(tmp_path / "spare", llm, vocab=VOCAB_SIZE + 5, template=template)
    to_hf_llava(tmp_path / "spare", tmp_path / "b")
    ours = load_file(tmp_path / "spare" / "model.safetensors")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        assert (name in ours) == (name in tensors) and (name not in ours or torch.equal(ours[name], tensors[name]))
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["image_token_index"] == VOCAB_SIZE and config["text_config"]["vocab_size"] == VOCAB_SIZE + 5


# the way back


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"llm": "llama", "tower": "clip", "template": "llama", "image_aspect_ratio": "pad"},
        {"connector": "linear", "image_aspect_ratio": "pad", "vocab": VOCAB_SIZE + 3},
        {"connector": "mlp1x_gelu", "template": "chatml", "style": "qwen2_instruct"},
    ],
    ids=str,
)
def test_back_again(arguments, tmp_path):
    """Weights, configuration, tokenizer and image processor are restored, also after transformers has saved them."""
    write(tmp_path / "ours", **arguments)
    to_hf_llava(tmp_path / "ours", tmp_path / "theirs")
    main(["--to", "v1", str(tmp_path / "theirs"), str(tmp_path / "back")])
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "saved")
    from_hf_llava(tmp_path / "saved", tmp_path / "back of saved")
    ours, tokenizer, processor, context_len = load_pretrained_model(tmp_path / "ours", device="cpu")
    for folder in ("back", "back of saved"):
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", folder))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        back, its_tokenizer, its_processor, its_context_len = load_pretrained_model(tmp_path / folder, device="cpu")
        fields, its_fields = (
            {k: v for k, v in model.config.to_dict().items() if not isinstance(v, dict)} for model in (ours, back)
        )
        assert fields == its_fields and context_len == its_context_len
        assert tokenizer.get_vocab() == its_tokenizer.get_vocab()
        assert tokenizer.chat_template == its_tokenizer.chat_template
        for role in ("bos_token", "eos_token", "pad_token", "unk_token", "padding_side"):
            assert getattr(tokenizer, role) == getattr(its_tokenizer, role)
        assert processor.to_dict() == its_processor.to_dict()


def test_a_llava_from_elsewhere(tmp_path):
    """Without our record, the template is recognised by its text, or must be given."""
    write(tmp_path / "ours", "llama", "clip", template="llama")
    to_hf_llava(tmp_path / "ours", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    del config["tinyllava"]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    from_hf_llava(tmp_path / "theirs", tmp_path / "back")
    back, *_ = load_pretrained_model(tmp_path / "back", device="cpu")
    assert back.config.template == "llama" and back.config.connector_type == "mlp2x_gelu"
    assert back.config.vocab_size == VOCAB_SIZE + 1  # <image> stays the token it is there
    image = picture()
    ours, prompt, pixels = ask_ours(tmp_path / "ours", "What?", image, "llama")
    with torch.no_grad():
        difference = back(prompt, images=pixels).logits[..., :VOCAB_SIZE] - ours(prompt, images=pixels).logits
    assert difference.abs().max() < 1e-5

    del config["text_config"]["max_position_embeddings"]  # as in many on the hub: the default
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    (tmp_path / "theirs" / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    from_hf_llava(tmp_path / "theirs", tmp_path / "shorter")
    back, *_ = load_pretrained_model(tmp_path / "shorter", device="cpu")
    assert back.config.tokenizer_model_max_length == 512
    assert back.config.text_config.eos_token_id == [back.tokenizer.eos_token_id, 3, 4]

    (tmp_path / "theirs" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ValueError, match=r"none of ours \(chatml, .*--template"):
        from_hf_llava(tmp_path / "theirs", tmp_path / "none")
    from_hf_llava(tmp_path / "theirs", tmp_path / "named", template="phi")
    for change, reason in (
        ({"vision_feature_layer": [-2, -1]}, "several layers"),
        ({"multimodal_projector_bias": False}, "no bias"),
        ({"projector_hidden_act": "relu"}, "'relu'"),
        ({"vision_config": {"model_type": "pixtral"}}, "'pixtral'"),
    ):
        (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=reason):
            from_hf_llava(tmp_path / "theirs", tmp_path / "none")


@pytest.mark.parametrize(
    ("file", "fields", "reason"),
    [
        ("config.json", {"text_config": 5}, "text_config is 5"),
        ("config.json", {"text_config": None}, "do not fit"),  # the default, which this model has not
        ("config.json", {"vision_config": None}, "do not fit"),
        ("config.json", {"dtype": "x"}, "cannot be built"),
        ("config.json", {"tie_word_embeddings": "x"}, "cannot be built"),
        ("config.json", {"tinyllava": [1]}, "tinyllava is [1]"),
        ("config.json", {"tinyllava": {"tokenizer_name_or_path": [1]}}, "tokenizer_name_or_path is [1]"),
        ("config.json", {"tinyllava": {"vocab_size": "x"}}, "vocab_size is 'x'"),
        ("preprocessor_config.json", {"size": [1]}, "an image processor that cannot be built"),
        ("preprocessor_config.json", None, "no settings of an image_processor"),
        ("tokenizer.json", {"model": 1}, "tokenizer"),
        ("model.safetensors", "multi_modal_projector.linear_2.bias", "multi_modal_projector.linear_2.bias"),
    ],
)
def test_a_llava_with_wrong_fields(llava, file, fields, reason, tmp_path, capsys):
    shutil.copytree(llava, tmp_path / "theirs")
    path = tmp_path / "theirs" / file
    if fields is None:
        path.unlink()
        (tmp_path / "theirs" / "processor_config.json").write_text("{}")
    elif file == "model.safetensors":
        save_file({name: tensor for name, tensor in load_file(path).items() if name != fields}, path)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(SystemExit):
        main(["--to", "v1", str(tmp_path / "theirs"), str(tmp_path / "back"), "--template", "qwen2_base"])
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert reason in told and told.startswith("python -m tinyllava_switchkd.model.export: ")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    to_hf_llava(write(folder / "ours"), folder / "theirs")
    return folder / "theirs"


# refusals


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"tower": "dinov2"}, "not a DINOv2VisionTower"),
        ({"tower": "siglip2"}, "not a Siglip2VisionTower"),
        ({"connector": "resampler"}, "'resampler' is not"),
        ({"connector": "mlp3x_gelu"}, "'mlp3x_gelu' is not"),
        ({"connector": "identity"}, "'identity' is not"),
        ({"llm": "phi", "template": "phi"}, "'phi' has"),
        ({"llm": "gemma", "template": "gemma"}, "'gemma' scales its embeddings"),
        ({"template": "pretrain"}, "'pretrain' does not write one question"),
    ],
    ids=str,
)
def test_what_llava_cannot_express_is_refused(arguments, reason, tmp_path):
    write(tmp_path / "ours", **arguments)
    with pytest.raises(ValueError, match=reason) as error:
        to_hf_llava(tmp_path / "ours", tmp_path / "theirs")
    assert "\n" not in str(error.value) and not (tmp_path / "theirs").exists()


def test_other_image_processing_is_refused(tmp_path):
    write(tmp_path / "ours")
    file = tmp_path / "ours" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": {"height": 35, "width": 35}}))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json makes images of shape \[3, 35, 35\]"):
        to_hf_llava(tmp_path / "ours", tmp_path / "theirs")


# files and commands


def test_files_that_older_versions_read(tmp_path):
    """transformers 4 has other names for some fields, and would compute something else without them."""
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    write(tmp_path / "ours", text={"rope_parameters": rope})
    to_hf_llava(tmp_path / "ours", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["text_config"]["rope_theta"] == config["text_config"]["rope_parameters"]["rope_theta"] == 1e6
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["text_config"]["architectures"] == ["Qwen2ForCausalLM"]
    fields = json.loads((tmp_path / "theirs" / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(fields.get("extra_special_tokens"), list)
    assert "image_processor" not in json.loads((tmp_path / "theirs" / "processor_config.json").read_text())
    names = set(load_file(tmp_path / "theirs" / "model.safetensors"))
    assert "vision_tower.vision_model.embeddings.position_embedding.weight" in names
    assert "language_model.model.embed_tokens.weight" in names and "language_model.lm_head.weight" not in names
    # vLLM's generic backend asks the processor for the number of image tokens before it has an image
    processor = AutoProcessor.from_pretrained(tmp_path / "theirs")
    assert processor._get_num_multimodal_tokens(image_sizes=[[30, 50]]).num_image_tokens == [15]


def test_command(tmp_path, capsys):
    ours, theirs = str(write(tmp_path / "ours")), str(tmp_path / "theirs")
    main(["--to", "hf-llava", ours, theirs, "--dtype", "bfloat16"])
    assert AutoTokenizer.from_pretrained(theirs).padding_side == "left"
    assert load_file(f"{theirs}/model.safetensors")["multi_modal_projector.linear_1.weight"].dtype == torch.bfloat16
    for arguments, message in (
        (["--to", "hf-llava", ours, theirs], "is not an empty folder"),
        (["--to", "gguf", theirs, str(tmp_path / "x")], "convert it with python -m tinyllava_switchkd.model.export"),
        (["--to", "hf-llava", ours, str(tmp_path / "x"), "--conv-version", "pretrain"], "'pretrain' does not write"),
        (["--to", "v1", str(tmp_path / "none"), str(tmp_path / "x")], "no folder"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        lines = capsys.readouterr().err.strip().splitlines()
        assert exit_.value.code == 1 and message in lines[-1]


def test_nothing_is_written_where_the_export_answers_otherwise(tmp_path, monkeypatch, capsys):
    def differs(source, folder):
        assert (folder / "model.safetensors").is_file()
        raise ValueError("The export answers otherwise.")

    monkeypatch.setattr("tinyllava_switchkd.model.export.hf_llava.verify_export", differs)
    with pytest.raises(SystemExit):
        main(["--to", "hf-llava", str(write(tmp_path / "ours")), str(tmp_path / "new" / "theirs")])
    assert "answers otherwise" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    with whole_folder("student", tmp_path / "a" / "b") as folder:
        (folder / "file").touch()
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").is_file() and (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o755
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]

    (tmp_path / "here").mkdir()  # it stays the same folder: a shell may be in it, or a disk be mounted there
    same = (tmp_path / "here").stat().st_ino
    monkeypatch.chdir(tmp_path / "here")
    with whole_folder("student", ".") as folder:
        (folder / "file").touch()
        assert not Path("file").exists()
    assert {path.name for path in Path.cwd().iterdir()} == {"file", "README.md", "card.json"}
    assert Path.cwd().stat().st_ino == same

    full = (OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)"))
    full += (OSError("2048 requested and 1008 written"),)  # numpy's
    for error in full:
        with pytest.raises(OSError, match="MB free"), whole_folder("student", tmp_path / "x" / "y") as folder:
            (folder / "half").touch()
            raise error
        assert not (tmp_path / "x").exists()
    with (
        pytest.raises(NotADirectoryError, match=r"cannot be created: .* is not a folder"),
        whole_folder("student", "file/out"),
    ):
        pass


def test_v1s_full_layout_from_its_split_one(tmp_path):
    model = tiny_llava(text={"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}})
    write_v1_split(model, tmp_path / "split")
    main(["--to", "v1", str(tmp_path / "split"), str(tmp_path / "full"), "--conv-version", "qwen2_base"])
    full, *_ = load_pretrained_model(tmp_path / "full", device="cpu")
    expected, tensors = model.state_dict(), full.state_dict()
    assert expected.keys() == tensors.keys() and all(torch.equal(expected[k], tensors[k]) for k in expected)
    assert full.config.template == "qwen2_base"
    assert json.loads((tmp_path / "full" / "config.json").read_text())["text_config"]["rope_theta"] == 1e6


def test_verification_sees_a_difference(tmp_path):
    ours, theirs = write(tmp_path / "ours"), tmp_path / "theirs"
    to_hf_llava(ours, theirs)
    assert verify_export(ours, theirs) < 1e-4
    tensors = load_file(theirs / "model.safetensors")
    tensors["multi_modal_projector.linear_2.bias"] = tensors["multi_modal_projector.linear_2.bias"] + 0.1
    save_file(tensors, theirs / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"logits differ .* do not use it"):
        verify_export(ours, theirs)
    template = (theirs / "chat_template.jinja").read_text()
    (theirs / "chat_template.jinja").write_text(template.replace("USER: ", "User: "))
    with pytest.raises(ValueError, match="tokenises the prompt differently"):
        verify_export(ours, theirs)


def test_questions_are_read_of_lines_and_lists(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "text": "What\u2028is?"}, {"image": "a.png", "question": "Where?"}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "lines.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps(rows))
    for name in ("lines.jsonl", "list.json"):
        found = read_questions(tmp_path / name, None)
        assert [one.text for one in found] == ["What\u2028is?", "Where?"]
        assert {one.image for one in found} == {tmp_path / "a.png"}
        assert len(read_questions(tmp_path / name, tmp_path, limit=1)) == 1
    for content, said in (
        ("", "holds no question"),
        ("{", "line 1: not valid JSON"),
        ('{"text": "?"}', "line 1: not a JSON object"),
        ('["text"]', "entry 1: not a JSON object"),
        ('{"a":' * 100_000, "line 1: nested too deeply"),
        ('[{"image": "../a.png", "text": "?"}]', "lies outside"),
        ('{"image": "b.png", "text": "?"}', "there is no image"),
    ):
        (tmp_path / "bad").write_text(content)
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            read_questions(tmp_path / "bad", None)
