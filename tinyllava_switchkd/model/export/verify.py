"""Check that an export to transformers' LLaVA computes the same as its checkpoint."""

from __future__ import annotations

import os

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tinyllava_switchkd.constants import IMAGE_TOKEN_INDEX
from tinyllava_switchkd.data.image import ImagePreprocess
from tinyllava_switchkd.data.text import TextPreprocess
from tinyllava_switchkd.model.chat import stop_token_ids
from tinyllava_switchkd.model.checkpoint import load_pretrained_model
from tinyllava_switchkd.model.export.files import RECORD
from tinyllava_switchkd.model.export.questions import default_questions


@torch.no_grad()
def verify_export(source: str | os.PathLike, exported: str | os.PathLike, max_new_tokens: int = 8) -> float:
    """Ask both models the first default question, about an image of noise, on the CPU.

    Args:
        source: the TinyLLaVA checkpoint.
        exported: the folder that `to_hf_llava` wrote.
        max_new_tokens: length of the greedy answers.

    Returns:
        the largest difference between two logits.

    Raises:
        ValueError: prompts or answers differ, or logits differ by more than 1e-4 (if the largest logit is above 10: by
            more than 1e-5 of it; in 16 bits: by more than 1e-2 of it).
    """
    question = default_questions()[0]
    image = question.open()
    theirs = AutoModelForImageTextToText.from_pretrained(exported, dtype="auto", trust_remote_code=False).eval()
    processor = AutoProcessor.from_pretrained(exported, backend="pil", trust_remote_code=False)
    ours, tokenizer, image_processor, _ = load_pretrained_model(source, device="cpu", dtype=theirs.dtype)

    content = [{"type": "image", "image": image}, {"type": "text", "text": question.text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(dtype=theirs.dtype)
    record = getattr(theirs.config, RECORD)
    template = record.get("template") or record["conv_version"]
    prompt = TextPreprocess(tokenizer, template).prompt_ids(question.text)[None]  # [1, T]
    pixels = ImagePreprocess(image_processor, ours.config)(image)[None]  # [1, 3, H, W]

    image_token = theirs.config.image_token_index
    expanded = [
        token
        for piece in prompt[0].tolist()
        for token in ([image_token] * ours.num_image_tokens if piece == IMAGE_TOKEN_INDEX else [piece])
    ]
    if inputs["input_ids"][0].tolist() != expanded:
        raise ValueError(f"The export tokenises the prompt differently than {source}; do not use it.")
    expected = ours(prompt, images=pixels).logits[0]  # [L, V]
    logits = theirs(**inputs).logits[0, :, : expected.shape[-1]]  # [L, V]
    difference = float((logits.float() - expected.float()).abs().max())
    largest = float(expected.float().abs().max())
    allowed = 1e-4 * max(1.0, largest / 10) if theirs.dtype == torch.float32 else 0.01 * largest
    if not difference <= allowed:
        raise ValueError(f"The export's logits differ from those of {source} by {difference:.2g}; do not use it.")
    answer = ours.generate(
        prompt,
        images=pixels,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_token_ids(ours, tokenizer, template) or None,
    )[0].tolist()
    their_answer = theirs.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    their_answer = their_answer[0, len(expanded) :].tolist()
    if answer != their_answer[: len(answer)]:
        raise ValueError(f"The export answers {their_answer} where {source} answers {answer}; do not use it.")
    return difference
