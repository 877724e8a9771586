"""Run an ONNX export in onnxruntime; torch takes no part in its answers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from tinyllava_switchkd.constants import DEFAULT_IMAGE_TOKEN
from tinyllava_switchkd.data.image_files import upright
from tinyllava_switchkd.data.template.base import as_text, mark_first
from tinyllava_switchkd.io import read_json
from tinyllava_switchkd.model.export.chat_template import messages_of
from tinyllava_switchkd.model.export.onnx_dtypes import suffix
from tinyllava_switchkd.model.export.onnx_graphs import DECODER, EMBED_TOKENS, GRAPHS, VISION_ENCODER
from tinyllava_switchkd.model.trust import refuse_code

Array = np.ndarray


class OnnxStudent:
    """A model made of the three graphs of an export.

    Args:
        folder: a folder written by ``--to onnx``.
        dtype: precision of the graphs: fp32, fp16, int8 or q4.
        threads: number of threads; None means onnxruntime's default.

    Raises:
        FileNotFoundError: the folder has no such graphs.
        ValueError: it asks to run code of its own, see `refuse_code`.
        ImportError: onnxruntime is not installed.
    """

    def __init__(self, folder: str | os.PathLike, dtype: str = "fp32", threads: int | None = None) -> None:
        self.folder = Path(folder)
        refuse_code(self.folder)
        import onnxruntime
        from transformers import AutoImageProcessor, AutoTokenizer

        from tinyllava_switchkd.data.image import ImagePreprocess

        self.config = read_json(self.folder / "config.json", what="configuration")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = options.inter_op_num_threads = threads
        self.sessions = {}
        for name in GRAPHS:
            file = self.folder / "onnx" / f"{name}{suffix(dtype)}.onnx"
            if not file.is_file():
                raise FileNotFoundError(f"There is no {file}; export it with --to onnx --dtype {dtype}.")
            self.sessions[name] = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        record = SimpleNamespace(**self.config["tinyllava"])
        image_processor = AutoImageProcessor.from_pretrained(self.folder, backend="pil", trust_remote_code=False)
        self._preprocess = ImagePreprocess(image_processor, record)
        self._cache = {
            entry.name: np.zeros(
                [axis if isinstance(axis, int) else 0 for axis in entry.shape],
                np.float16 if entry.type == "tensor(float16)" else np.float32,
            )
            for entry in self.sessions[DECODER].get_inputs()
            if entry.name.startswith("past_key_values.")
        }
        stops = read_json(self.folder / "generation_config.json").get("eos_token_id")
        self.stops = {stops} if isinstance(stops, int) else set(stops or ())

    def pixels(self, images: Sequence[Image.Image]) -> Array:
        """PIL images -> [I, 3, H, W]."""
        return np.stack([self._preprocess(image).numpy() for image in images])

    def prompt_ids(self, question: str, num_images: int = 1, history: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Ids of a prompt in the folder's chat template, with each image's token repeated for its visual tokens."""
        count = self.config["image_seq_length"]
        (first, answer), *rest = [*history, (question, None)]
        turns = [(mark_first(first, num_images), answer), *((as_text(asked), told) for asked, told in rest)]
        messages = messages_of([(asked, told and as_text(told)) for asked, told in turns])
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(
            text.replace(DEFAULT_IMAGE_TOKEN, DEFAULT_IMAGE_TOKEN * count), add_special_tokens=False
        ).input_ids

    def embed(self, rows: Sequence[Sequence[int]], pixels: Array | None = None) -> tuple[Array, Array]:
        """Embeddings [B, L, D] and attention mask [B, L] of prompts with their images, padded on the left.

        Args:
            rows: ids of each prompt.
            pixels: [I, 3, H, W] in the order of the prompts' images.

        Raises:
            ValueError: the numbers of visual tokens and of their placeholders differ.
        """
        longest = max(map(len, rows))
        ids = np.zeros((len(rows), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, values in enumerate(rows):
            ids[row, longest - len(values) :] = values
            mask[row, longest - len(values) :] = 1
        (embeds,) = self.sessions[EMBED_TOKENS].run(None, {"input_ids": ids})  # [B, L, D]
        places = (ids == self.config["image_token_index"]) & (mask == 1)
        features = np.zeros((0, embeds.shape[-1]), np.float32)
        if pixels is not None:
            (found,) = self.sessions[VISION_ENCODER].run(None, {"pixel_values": pixels})  # [I, K, D]
            features = found.reshape(-1, found.shape[-1])
        if places.sum() != len(features):
            raise ValueError(f"The prompts have {places.sum()} placeholders for {len(features)} visual tokens.")
        embeds[places] = features
        return embeds, mask

    def logits(self, rows: Sequence[Sequence[int]], pixels: Array | None = None) -> Array:
        """Logits [B, L, V] at every position of the prompts (left padding included)."""
        embeds, mask = self.embed(rows, pixels)
        return self._step(embeds, mask, _positions(mask), self._empty(len(rows)), 0)[0]

    def steps(self, rows: Sequence[Sequence[int]], pixels: Array | None = None) -> Iterator[Array]:
        """Decode greedily and endlessly, yielding the next token of each prompt [B]."""
        embeds, mask = self.embed(rows, pixels)
        cache, positions = self._empty(len(rows)), _positions(mask)
        while True:
            logits, cache = self._step(embeds, mask, positions, cache, 1)
            tokens = logits[:, -1].argmax(-1)  # [B]
            yield tokens
            (embeds,) = self.sessions[EMBED_TOKENS].run(None, {"input_ids": tokens[:, None]})
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
            positions = positions[:, -1:] + 1

    def generate(
        self, rows: Sequence[Sequence[int]], pixels: Array | None = None, max_new_tokens: int = 512
    ) -> list[list[int]]:
        """Greedy answers, without their end tokens."""
        answers: list[list[int]] = [[] for _ in rows]
        open_rows = set(range(len(rows)))
        for _, tokens in zip(range(max_new_tokens), self.steps(rows, pixels), strict=False):
            for row in sorted(open_rows):
                if int(tokens[row]) in self.stops:
                    open_rows.remove(row)
                else:
                    answers[row].append(int(tokens[row]))
            if not open_rows:
                break
        return answers

    def chat(
        self,
        prompt: str,
        image: Image.Image | list[Image.Image] | tuple[Image.Image, ...] | None = None,
        history: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = 512,
    ) -> str:
        """Answer a question about one or several PIL images or none, like `TinyLlavaForConditionalGeneration.chat`."""
        images = [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]
        ids = self.prompt_ids(prompt, len(images), history)
        pixels = self.pixels([upright(image) for image in images]) if images else None
        return self.tokenizer.decode(self.generate([ids], pixels, max_new_tokens)[0], skip_special_tokens=True).strip()

    def _empty(self, batch: int) -> dict[str, Array]:
        return {name: np.zeros((batch, *value.shape[1:]), value.dtype) for name, value in self._cache.items()}

    def _step(
        self, embeds: Array, mask: Array, positions: Array, cache: dict[str, Array], keep: int
    ) -> tuple[Array, dict[str, Array]]:
        inputs = {
            "inputs_embeds": embeds,
            "attention_mask": mask,
            "position_ids": positions,
            "num_logits_to_keep": np.array(keep, np.int64),
        }
        logits, *present = self.sessions[DECODER].run(None, inputs | cache)
        return logits, dict(zip(cache, present, strict=True))


def _positions(mask: Array) -> Array:
    """[B, L] positions counted over tokens only."""
    return (mask.cumsum(1) - 1).clip(min=0)
