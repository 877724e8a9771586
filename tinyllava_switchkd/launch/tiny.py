"""Tiny random models and drawn pictures for the recipe `debug`: ``python -m tinyllava_switchkd.launch.tiny FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tinyllava_switchkd.data.template.base import exchange
from tinyllava_switchkd.io import write_json

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "yellow": (230, 210, 40)}


def write_tiny_world(folder: Path) -> None:
    """Write qwen2-teacher, qwen2-student, siglip-tiny, images, captions.json and conversations.json; none twice."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import (
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen2Tokenizer,
        SiglipImageProcessor,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    if (folder / "conversations.json").is_file():  # the last one to be written
        return
    end = "<|endoftext|>"
    vocabulary = [end, *sorted(pre_tokenizers.ByteLevel.alphabet())]  # text goes byte by byte
    tokenizer = Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate(vocabulary)},
        merges=[],
        eos_token=end,
        pad_token=end,
        unk_token=None,
        model_max_length=512,
    )
    for seed, (who, width) in enumerate((("student", 32), ("teacher", 48))):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        Qwen2ForCausalLM(config).save_pretrained(folder / f"qwen2-{who}")
        tokenizer.save_pretrained(folder / f"qwen2-{who}")
    vision = SiglipVisionConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        vision_use_head=False,
    )
    SiglipVisionModel(vision).save_pretrained(folder / "siglip-tiny")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "siglip-tiny")
    _write_data(folder)


def _write_data(folder: Path) -> None:
    from PIL import Image, ImageDraw

    (folder / "images").mkdir(parents=True, exist_ok=True)
    captions, conversations = [], []
    for index in range(16):
        name, rgb = list(COLOURS.items())[index % len(COLOURS)]
        picture = Image.new("RGB", (48, 48), "white")
        left = 4 + index % 5 * 3
        ImageDraw.Draw(picture).rectangle((left, left, left + 24, left + 24), fill=rgb)
        picture.save(folder / "images" / f"{index}.png")
        sample = {"id": str(index), "image": f"{index}.png"}
        captions.append({**sample, "conversations": exchange("Describe.\n<image>", f"A {name} square.")})
        conversations.append({**sample, "conversations": exchange("<image>\nWhich colour?", f"It is {name}.")})
    write_json(folder / "captions.json", captions)
    write_json(folder / "conversations.json", conversations)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    (folder,) = sys.argv[1:] if argv is None else argv
    write_tiny_world(Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
