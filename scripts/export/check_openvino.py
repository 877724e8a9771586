"""Does OpenVINO give the student's answers? check_openvino.py EXPORT FOLDER, where FOLDER was written by ask.py."""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

MAX_NEW_TOKENS = 32


def compare(args: argparse.Namespace) -> None:
    """Convert the folder, answer the questions and print how many answers are equal."""
    from optimum.intel import OVModelForVisualCausalLM
    from PIL import Image
    from transformers import AutoProcessor

    rows = json.loads((args.folder / "expected.json").read_text(encoding="utf-8"))
    config = json.loads((args.export / "config.json").read_text(encoding="utf-8"))
    model = OVModelForVisualCausalLM.from_pretrained(
        args.export, export=True, load_in_8bit=False, ov_config={"INFERENCE_PRECISION_HINT": "f32"}
    )
    processor = AutoProcessor.from_pretrained(args.export)  # without torchvision, it resizes with Pillow
    visual = [config["image_token_index"]] * config["image_seq_length"]
    prompts = equal = 0
    for index, row in enumerate(rows):
        image = {"type": "image", "image": Image.open(args.folder / f"{index}.png").convert("RGB")}
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [image, {"type": "text", "text": row["question"]}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        prompt = inputs["input_ids"][0].tolist()
        prompts += prompt == row["before"] + visual + row["after"]
        found = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0].tolist()
        answer = [token for token in found[len(prompt) :] if token not in row["stops"]]
        equal += answer == row["answer"]
        if answer != row["answer"]:
            text = processor.tokenizer.decode(answer, skip_special_tokens=True)
            print(f"{row['question']!r}: {text!r}, expected {row['text']!r}")
    versions = f"openvino {version('openvino')}, optimum-intel {version('optimum-intel')}"
    print(f"{versions}: {prompts} of {len(rows)} prompts have the same tokens, {equal} answers are equal.")
    if min(prompts, equal) < len(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("folder", type=Path)
    compare(parser.parse_args())
