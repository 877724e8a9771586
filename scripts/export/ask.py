"""Write a student's answers, for comparison with its exports: ask.py MODEL FOLDER [--questions FILE ...].

FOLDER gets ``expected.json`` and the images: the originals, and squares as in training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image

from tinyllava_switchkd.constants import IMAGE_TOKEN_INDEX
from tinyllava_switchkd.data import ImagePreprocess, TextPreprocess
from tinyllava_switchkd.model import load_pretrained_model
from tinyllava_switchkd.model.chat import conversation_template, stop_token_ids
from tinyllava_switchkd.model.export.questions import default_questions, read_questions

MAX_NEW_TOKENS = 32


def ask(args: argparse.Namespace) -> None:
    """Write questions, images, our prompts and answers."""
    model, tokenizer, processor, _ = load_pretrained_model(args.model, device="cpu", dtype=torch.float32)
    preprocess = ImagePreprocess(processor, model.config)
    template = conversation_template(model, tokenizer)
    text, stops = TextPreprocess(tokenizer, template), stop_token_ids(model, tokenizer, template)
    questions = default_questions()
    if args.questions:
        questions = read_questions(args.questions, args.image_folder, args.max_questions)
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, question in enumerate(questions):
        image = square = question.open()
        if model.config.image_aspect_ratio == "pad":
            square = preprocess.expand2square(image, tuple(int(mean * 255) for mean in processor.image_mean))
        square = square.resize((model.image_size, model.image_size), Image.BICUBIC)
        image.save(args.folder / f"{index}.png")
        square.save(args.folder / f"{index}_square.png")
        messages = [{"from": "human", "value": f"<image>\n{question.text}"}, {"from": "gpt", "value": None}]
        prompt = text(messages, mode="eval")["input_ids"]  # [T]
        pixels = preprocess(image)[None]  # [1, 3, H, W]
        with torch.no_grad():
            logits = model(prompt[None], images=pixels).logits[0, -1]  # [V]
            answer = model.generate(
                prompt[None],
                images=pixels,
                attention_mask=torch.ones_like(prompt[None]),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                eos_token_id=stops or None,
            )[0].tolist()
        ids = prompt.tolist()
        cut = ids.index(IMAGE_TOKEN_INDEX)
        rows.append(
            {
                "question": question.text,
                "before": ids[:cut],
                "after": ids[cut + 1 :],
                "answer": [token for token in answer if token not in stops],
                "text": tokenizer.decode(answer, skip_special_tokens=True).strip(),
                "stops": stops,
                "logits": logits.tolist(),
                "size": image.size,
            }
        )
    (args.folder / "expected.json").write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", help="a question file in LLaVA's format; default: four drawings")
    parser.add_argument("--image_folder")
    parser.add_argument("--max_questions", type=int)
    ask(parser.parse_args())
