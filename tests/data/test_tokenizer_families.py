"""Every template with every kind of tokenizer: the decoded ids are the whole prompt."""

from __future__ import annotations

import pytest

from tests.data.test_template import learned, talk
from tests.data.tokenizers import FAMILIES, QWEN2_CHAT_TEMPLATE, llama, llama3, qwen2, smollm2
from tinyllava_switchkd.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinyllava_switchkd.data import TemplateFactory, TextPreprocess
from tinyllava_switchkd.data.template.base import begin_tokens

TEXTS = {
    "words": ("What is on the left?", "A red cat."),
    "the image last": ("What is it?\n<image>", "A cat"),
    "several rounds": ("<image>\nWhat is it?", "A cat.", "Which colour?", "Red, of course"),
    "two images": ("<image>\n<image>\nAre these the same?", "No"),
    "spaces and lines": ("<image>\n  Say\n\nwhat  it is: ", "\n\n a  cat \n"),
    "other scripts": ("<image>\nКто это? 猫ですか 🐈", "猫 — naïve 🐈"),
    "digits": ("<image>\n12+30?", "42"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    tokenizer = FAMILIES[request.param]()
    tokenizer.chat_template = tokenizer.chat_template or QWEN2_CHAT_TEMPLATE
    return request.param, tokenizer


def decoded(ids: list[int], tokenizer) -> str:
    """Decode ids, with images written out and without the tokens that the tokenizer adds at the start."""
    begin = begin_tokens(tokenizer)
    assert ids[: len(begin)] == begin
    runs = [[]]
    for token in ids[len(begin) :]:
        if token == IMAGE_TOKEN_INDEX:
            runs.append([])
        else:
            runs[-1].append(token)
    return DEFAULT_IMAGE_TOKEN.join(
        tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False) for run in runs
    )


def squeezed(text: str) -> str:
    """Without spaces, because older sentencepiece tokenizers add one after a special token.

    Those from a GGUF are of this kind in transformers 5.17.
    """
    return "".join(text.split())


def is_legacy(name: str, tokenizer) -> bool:
    text = "A</s>B"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return "legacy" in name or ("GGUF, pieces" in name and tokenizer.decode(ids) != text)


@pytest.mark.parametrize("version", TemplateFactory.list())
@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
def test_ids_are_the_prompt(family, version, texts):
    name, tokenizer = family
    exactly = (lambda text: text) if not is_legacy(name, tokenizer) else squeezed
    encode = TextPreprocess(tokenizer, version)
    template = encode.template.for_tokenizer(tokenizer)
    images = "".join(texts).count(DEFAULT_IMAGE_TOKEN)
    marked = list(texts[::2])
    if images == 1:
        marked[0] = f"{DEFAULT_IMAGE_TOKEN}\n{marked[0].replace(DEFAULT_IMAGE_TOKEN, '').strip()}"

    asked = encode(talk(*texts[:-1], None), mode="eval", num_images=images)
    assert exactly(decoded(asked["input_ids"].tolist(), tokenizer)) == exactly(asked["prompt"])

    trained = template.encode(
        talk(*texts), tokenizer, "train", num_images=images
    )  # ends of answers are checked in another test
    prompt = template.prompt(marked, texts[1::2])
    if version == "pretrain" and not images:
        prompt = prompt.replace(DEFAULT_IMAGE_TOKEN, "")
    ids = trained["input_ids"].tolist()
    assert exactly(decoded(ids, tokenizer)) == exactly(prompt)
    if version != "pretrain":  # generation continues the text of the training
        assert ids[: len(asked["input_ids"])] == asked["input_ids"].tolist()
    begin = len(begin_tokens(tokenizer))
    assert (trained["labels"][:begin] == IGNORE_INDEX).all()
    learned_ids = [token for token, label in zip(ids, trained["labels"].tolist(), strict=True) if label != IGNORE_INDEX]
    assert learned_ids == [label for label in trained["labels"].tolist() if label != IGNORE_INDEX]
    runs = [exactly(run) for run in learned(trained, tokenizer)]
    expected = [exactly(answer + template.eos) for answer in texts[1::2]]
    if version == "pretrain":
        assert squeezed("".join(runs)) == squeezed("".join(texts[1::2]))
    else:
        assert [run.strip() for run in runs] == [answer.strip() for answer in expected]


def test_the_token_after_an_image_stays_where_bos_is_the_templates():
    tokenizer = smollm2()
    after = tokenizer("\nWho is it?<|im_end|>\n").input_ids
    for mode, answer in (("train", "Me"), ("eval", None)):
        ids = TextPreprocess(tokenizer, "chatml")(talk("<image>\nWho is it?", answer), mode=mode)["input_ids"].tolist()
        place = ids.index(IMAGE_TOKEN_INDEX)
        assert ids[place + 1 : place + 1 + len(after)] == after
        assert ids[0] == tokenizer.bos_token_id
        without = TextPreprocess(qwen2("<|im_end|>", tokenizer.chat_template), "chatml")
        assert ids == without(talk("<image>\nWho is it?", answer), mode=mode)["input_ids"].tolist()


def test_what_a_tokenizer_puts_around_a_text():
    assert begin_tokens(qwen2()) == begin_tokens(smollm2()) == []
    assert begin_tokens(llama(legacy=False)) == [1]
    tokenizer = llama3(eos=True)
    assert begin_tokens(tokenizer) == [tokenizer.bos_token_id]
    ids = TextPreprocess(tokenizer, "qwen2_instruct")(talk("<image>\nWho?", "Me"))["input_ids"].tolist()
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_begin_token_that_is_written_in_a_turn_stays():
    tried = set()
    for make in FAMILIES.values():
        tokenizer = make()
        text = tokenizer.bos_token
        if text not in (None, "<|endoftext|>"):  # which the template ends an answer with
            ids = TextPreprocess(tokenizer, "phi")(talk(f"<image>\n{text}", f"{text} it is"), mode="eval")["input_ids"]
            assert ids.tolist().count(tokenizer.bos_token_id) == 2 + len(begin_tokens(tokenizer)), text
            tried.add(text)
    assert tried >= {"<s>", "<bos>", "<|im_start|>"}
