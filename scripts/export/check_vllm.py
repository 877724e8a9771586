"""Does vLLM give the student's answers? check_vllm.py EXPORT FOLDER, where FOLDER was written by ask.py."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

MAX_NEW_TOKENS = 32


def compare(args: argparse.Namespace) -> None:
    """Answer all questions in one vLLM batch and print how many answers are equal."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import vllm
    from PIL import Image

    rows = json.loads((args.folder / "expected.json").read_text(encoding="utf-8"))
    config = json.loads((args.export / "config.json").read_text(encoding="utf-8"))
    longest = config["text_config"]["max_position_embeddings"]
    llm = vllm.LLM(
        str(args.export),
        dtype="float32",
        max_model_len=min(args.context, longest),
        enforce_eager=True,
        limit_mm_per_prompt={"image": 1},
    )
    conversations = []
    for index, row in enumerate(rows):
        image = {"type": "image_pil", "image_pil": Image.open(args.folder / f"{index}.png").convert("RGB")}
        conversations.append([{"role": "user", "content": [image, {"type": "text", "text": row["question"]}]}])
    outputs = llm.chat(conversations, vllm.SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS))

    visual = [config["image_token_index"]] * config["image_seq_length"]
    prompts = equal = 0
    for row, output in zip(rows, outputs, strict=True):
        prompts += list(output.prompt_token_ids) == row["before"] + visual + row["after"]
        answer = [token for token in output.outputs[0].token_ids if token not in row["stops"]]
        equal += answer == row["answer"]
        if answer != row["answer"]:
            print(f"{row['question']!r}: {output.outputs[0].text!r}, expected {row['text']!r}")
    print(f"vLLM {vllm.__version__}: {prompts} of {len(rows)} prompts have the same tokens, {equal} answers are equal.")
    if min(prompts, equal) < len(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--context", type=int, default=2048)
    compare(parser.parse_args())
