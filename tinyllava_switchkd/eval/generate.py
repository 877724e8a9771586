"""Answers of a checkpoint to batches of prompts: greedy, padded on the left, with the template of its training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import BaseImageProcessor, DynamicCache, GenerationConfig, PreTrainedTokenizerBase

from tinyllava_switchkd.constants import FLOAT_DTYPES
from tinyllava_switchkd.data.image import ImagePreprocess
from tinyllava_switchkd.data.template import TemplateFactory
from tinyllava_switchkd.data.text import TextPreprocess
from tinyllava_switchkd.eval.guesses import MOST_GUESSES, Guesses, can_try, try_guesses
from tinyllava_switchkd.eval.prefix import SharedPrefix, attends_to_all, positions_vary
from tinyllava_switchkd.model.caches import with_cache
from tinyllava_switchkd.model.chat import stop_token_ids
from tinyllava_switchkd.model.checkpoint import load_pretrained_model
from tinyllava_switchkd.model.configuration import TinyLlavaConfig
from tinyllava_switchkd.model.layouts import read_config
from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava_switchkd.model.weights import resolve_folder
from tinyllava_switchkd.runtime import check_device, default_device

logger = logging.getLogger(__name__)

T = TypeVar("T")

DTYPES = ("auto", *FLOAT_DTYPES)


def template_of(config: TinyLlavaConfig, wanted: str | None, where: str | Path) -> str:
    """The conversation template for a checkpoint: its own, unless the user names another.

    Args:
        config: the checkpoint's configuration.
        wanted: the user's choice, or None.
        where: the checkpoint, for messages.

    Raises:
        ValueError: neither names a template, or the name is unknown.
    """
    own = config.template
    if wanted is None and own is None:
        raise ValueError(
            f"The checkpoint {where} does not name its conversation template, as those of TinyLLaVA v1 do not: pass "
            f"--template (phi for its Phi-2, StableLM and Qwen2 models, llama for TinyLlama and OpenELM, gemma)."
        )
    chosen = TemplateFactory.name_of(wanted or own)
    if own is not None and chosen != TemplateFactory.name_of(own):
        logger.warning(
            "The checkpoint was trained with the conversation template %r and is asked with %r: expect lower scores.",
            own,
            chosen,
        )
    return chosen


def image_policy_of(config: TinyLlavaConfig, image_aspect_ratio: str | None) -> str:
    """How images become square ("square" or "pad"): as in training, unless the user chooses the other way."""
    own = config.image_aspect_ratio or "square"
    if image_aspect_ratio not in (None, own):
        logger.warning(
            "The checkpoint was trained with image_aspect_ratio %r and is shown images with %r: expect lower scores.",
            own,
            image_aspect_ratio,
        )
    return image_aspect_ratio or own


def dtype_of(config: TinyLlavaConfig, dtype: str, device: str | torch.device) -> torch.dtype:
    """The weights' dtype. "auto" is float32 on a CPU; on a GPU the checkpoint's half precision, otherwise bfloat16.

    Raises:
        ValueError: the name is not in `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"Unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
    if dtype != "auto":
        return getattr(torch, dtype)
    if torch.device(device).type == "cpu":
        return torch.float32
    own = getattr(config, "dtype", None) or getattr(config.text_config, "dtype", None)
    own = getattr(torch, own, None) if isinstance(own, str) else own
    return own if own in (torch.float16, torch.bfloat16) else torch.bfloat16


@dataclass(frozen=True)
class Setting:
    """A checkpoint and how it is asked, determined before anything is loaded.

    Attributes:
        folder: the checkpoint on this machine.
        name: the path or hub name that the user gave.
        config: its configuration.
        template: name of the conversation template.
        image_aspect_ratio: "square" or "pad".
        dtype: of the weights.
        device: of the weights.
        attn_implementation: as in transformers; None for its default.
    """

    folder: Path
    name: str
    config: TinyLlavaConfig
    template: str
    image_aspect_ratio: str
    dtype: torch.dtype
    device: torch.device
    attn_implementation: str | None = None

    @classmethod
    def of(
        cls,
        model_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str = "auto",
        template: str | None = None,
        image_aspect_ratio: str | None = None,
        attn_implementation: str | None = None,
    ) -> Setting:
        """Resolve the checkpoint, read its configuration, and decide how it is asked.

        Args:
            model_path: a folder or a hub repository.
            device: None is this process's GPU if there is one, else the CPU.
            dtype: one of `DTYPES`, see `dtype_of`.
            template: conversation template; the checkpoint's own if None.
            image_aspect_ratio: "square" or "pad"; the checkpoint's own if None.
            attn_implementation: as in transformers.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: it is not a TinyLLaVA, or neither it nor `template` names a template.
        """
        folder = resolve_folder(model_path)
        config = read_config(folder)
        device = check_device(default_device() if device is None else device)
        return cls(
            folder,
            str(model_path),
            config,
            template_of(config, template, model_path),
            image_policy_of(config, image_aspect_ratio),
            dtype_of(config, dtype, device),
            device,
            attn_implementation,
        )


class Answerer:
    """A model with everything needed to ask it.

    Decoding is greedy and takes only the stop tokens from a ``generation_config.json``. Qwen's, for example, has a
    repetition penalty, which is meant for chats and not for benchmarks.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        image_processor: its image processor.
        template: name of the conversation template.
        image_aspect_ratio: "square" or "pad"; the model's own if None.

    Attributes:
        prompt_ids: question and number of images -> token ids, see `TextPreprocess.prompt_ids`.
        pixels_of: picture -> pixel values [3, H, W].
        batch_limit: rows that fit into memory; None until a batch did not fit.
        guesses: earlier answers of one token, tried first (`guesses.py`); None, the default, tries none.
    """

    def __init__(
        self,
        model: TinyLlavaForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        template: str,
        image_aspect_ratio: str | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.image_aspect_ratio = image_aspect_ratio or model.config.image_aspect_ratio or "square"
        policy = SimpleNamespace(image_aspect_ratio=self.image_aspect_ratio)
        self.pixels_of = ImagePreprocess(image_processor, policy)
        self.prompt_ids = TextPreprocess(tokenizer, template).prompt_ids
        self.stop_token_ids = stop_token_ids(model, tokenizer, template)
        if not self.stop_token_ids:
            raise ValueError("Neither the language model nor its tokenizer names a token that ends an answer.")
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.stop_token_ids[0]
        self.batch_limit: int | None = None
        self.guesses: Guesses | None = None

    @classmethod
    def from_pretrained(cls, model_path: str | Path, **asked: Any) -> Answerer:
        """Load a checkpoint of any layout. The arguments are those of `Setting.of`."""
        return cls.load(Setting.of(model_path, **asked))

    @classmethod
    def load(cls, setting: Setting) -> Answerer:
        """Load the checkpoint of a setting.

        Raises:
            FileNotFoundError: it lacks weights or a tokenizer.
            ValueError: its parts do not fit together.
        """
        model, tokenizer, image_processor, _ = load_pretrained_model(
            setting.folder,
            device=setting.device,
            dtype=setting.dtype,
            attn_implementation=setting.attn_implementation,
            config=setting.config,
        )
        return cls(model, tokenizer, image_processor, setting.template, setting.image_aspect_ratio)

    def auto_batch_size(self, characters: int, images: int, max_new_tokens: int) -> int:
        """How many prompts to answer at once: on a GPU as many as its free memory holds, on a CPU 16.

        Estimated from the keys and values of the longest prompt, with as much again for activations. A batch that still
        does not fit is halved (`answer_ids`).

        Args:
            characters: length of the longest prompt.
            images: largest number of pictures in a prompt.
            max_new_tokens: length limit of an answer.
        """
        device = self.model.device
        if device.type != "cuda":
            return 16
        config = self.model.config.text_config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * heads * width * self.model.dtype.itemsize
        tokens = characters // 2 + images * self.model.num_image_tokens + max_new_tokens
        free, _ = torch.cuda.mem_get_info(device)
        rows = int(0.7 * free / (2 * per_token * tokens))
        return 1 << max(0, min(rows, 256).bit_length() - 1)

    @torch.inference_mode()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixel values [I, 3, H, W] -> visual tokens [I, K, D], as many at a time as fit into memory."""
        return torch.stack(self._in_chunks(len(pixels), lambda rows: list(self.model.encode_images(pixels[rows]))))

    def answer(
        self, prompts: Sequence[Tensor], images: Sequence[Tensor | None], max_new_tokens: int, **sampling: object
    ) -> list[str]:
        """As `answer_ids`, but returns the answers as stripped texts."""
        ids = self.answer_ids(prompts, images, max_new_tokens, **sampling)
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]

    @torch.inference_mode()
    def answer_ids(
        self, prompts: Sequence[Tensor], images: Sequence[Tensor | None], max_new_tokens: int, **sampling: object
    ) -> list[list[int]]:
        """Answer a batch of prompts.

        A batch that does not fit into the GPU's memory is answered in parts, and so are all later batches.

        Args:
            prompts: token ids [T] of each prompt, see `TextPreprocess.prompt_ids`.
            images: visual tokens [images of the prompt, K, D] of each prompt, None for a prompt without images. Give
                the same tensor to all prompts about a picture: their shared prefix is then computed once.
            max_new_tokens: length limit.
            sampling: settings for other than greedy decoding, as in transformers (`do_sample`, `temperature`, ...).

        Returns:
            token ids of the answers, without the stop tokens.
        """
        decoding = self.decoding(max_new_tokens, **sampling)
        return self._in_chunks(len(prompts), lambda rows: self._answer(prompts[rows], images[rows], decoding))

    def decoding(self, max_new_tokens: int, **sampling: object) -> GenerationConfig:
        """The complete decoding settings, independent of the language model's own."""
        greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}
        return GenerationConfig(
            **{**greedy, **sampling},
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self.stop_token_ids),
            pad_token_id=self.pad_token_id,
        )

    def _in_chunks(self, count: int, compute: Callable[[slice], list[T]]) -> list[T]:
        """The joined results of `compute(slice)` over all rows. The slices are halved when memory runs out."""
        results: list[T] = []
        while len(results) < count:
            size = min(count - len(results), self.batch_limit or count)
            try:
                chunk = compute(slice(len(results), len(results) + size))
            except torch.OutOfMemoryError:
                if size <= 1:
                    raise
                self.batch_limit = size // 2
                logger.warning("%d rows do not fit into memory; continuing with %d at a time.", size, self.batch_limit)
            else:
                results.extend(chunk)
                continue
            torch.cuda.empty_cache()  # outside the handler: the traceback holds the tensors of the failed attempt
        return results

    def _answer(
        self, prompts: Sequence[Tensor], images: Sequence[Tensor | None], decoding: GenerationConfig
    ) -> list[list[int]]:
        language_model = self.model.language_model
        if positions_vary(language_model.config, _longest(prompts, images) + decoding.max_new_tokens):
            if len(prompts) > 1:
                alone = [slice(row, row + 1) for row in range(len(prompts))]
                return [answer for row in alone for answer in self._answer(prompts[row], images[row], decoding)]
            # "dynamic" frequencies stay those of the longest text until there is a short one
            language_model(torch.tensor([[self.pad_token_id]], device=self.model.device), use_cache=False)
        own = language_model.generation_config  # generate() would fill settings that are None in ours from it
        language_model.generation_config = decoding
        try:
            if decoding.num_beams > 1:  # transformers would not copy the shared prefix for each beam
                answers = self._generate(prompts, images)
            else:
                prefix = SharedPrefix.of(prompts, images, language_model.config, decoding.max_new_tokens)
                guesses = self._guesses_for(prompts, images, decoding)
                if guesses:
                    answers = self._try(guesses, prefix, prompts, images, decoding)
                elif prefix is not None:
                    answers = self._continue(*self._after(prefix, prompts))
                else:
                    answers = self._generate(prompts, images)
        finally:
            language_model.generation_config = own
        if self.guesses is not None:
            self.guesses.learn(answers)
        return answers

    def _generate(self, prompts: Sequence[Tensor], images: Sequence[Tensor | None]) -> list[list[int]]:
        """Answers to whole prompts."""
        input_ids, attention_mask = self._padded(prompts)  # [B, T] each
        output = self.model.generate(input_ids, attention_mask=attention_mask, image_features=_joined(images))
        return self._cut(output)

    def _after(self, prefix: SharedPrefix, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor, DynamicCache]:
        """The arguments of `_continue` for prompts after a shared prefix; padding is between prefix and prompt."""
        cache, length = prefix.compute(self.model)
        input_ids, attention_mask = self._padded([prompt[len(prefix.head) :] for prompt in prompts])  # [B, T] each
        tail = self.model.get_input_embeddings()(input_ids)  # [B, T, D]
        return tail, torch.cat([attention_mask.new_ones(len(tail), length), attention_mask], dim=1), cache

    def _continue(
        self, tail: Tensor, attention_mask: Tensor, cache: DynamicCache, decoding: GenerationConfig | None = None
    ) -> list[list[int]]:
        """Answers after P cached positions and embeddings [B, T, D]; the mask [B, P + T] is for both."""
        seen = tail.new_zeros(len(tail), attention_mask.shape[1] - tail.shape[1], tail.shape[-1])
        output = self.model.language_model.generate(
            inputs_embeds=torch.cat([seen, tail], dim=1),  # the first P are placeholders for the cached positions
            attention_mask=attention_mask,
            generation_config=decoding,
            **with_cache(cache),
        )
        return self._cut(output)

    def _guesses_for(
        self, prompts: Sequence[Tensor], images: Sequence[Tensor | None], decoding: GenerationConfig
    ) -> list[int]:
        """The guesses to try; none if decoding is not plainly greedy or the model does not support it."""
        if self.guesses is None:
            return []
        language_model = self.model.language_model
        # guesses are cropped from the cache afterwards, which a full window does not allow
        longest = _longest(prompts, images) + max(decoding.max_new_tokens, MOST_GUESSES + 1)
        plain = decoding.to_diff_dict() == self.decoding(decoding.max_new_tokens).to_diff_dict()
        config = language_model.config
        same = attends_to_all(config, longest) and not positions_vary(config, longest)
        if plain and same and can_try(language_model):
            return self.guesses.tokens()
        return []

    def _try(
        self,
        guesses: Sequence[int],
        prefix: SharedPrefix | None,
        prompts: Sequence[Tensor],
        images: Sequence[Tensor | None],
        decoding: GenerationConfig,
    ) -> list[list[int]]:
        """Answers, with only one pass for those that are a guess, see `try_guesses`."""
        language_model = self.model.language_model
        if prefix is not None:
            tail, attention_mask, cache = self._after(prefix, prompts)
        else:
            input_ids, attention_mask = self._padded(prompts)
            whole = self.model.prepare_inputs(
                input_ids, attention_mask, image_features=_joined(images), padding_side="left"
            )
            tail, attention_mask = whole.inputs_embeds, whole.attention_mask
            cache = DynamicCache(config=language_model.config)
        tried = try_guesses(language_model, tail, attention_mask, cache, guesses, self.stop_token_ids)
        answers = self._cut(tried.first[:, None])
        open_rows = [row for row, ends in enumerate(tried.ends.tolist()) if answers[row] and not ends]
        if open_rows and decoding.max_new_tokens > 1:
            rows = torch.tensor(open_rows, device=tail.device)
            tried.cache.batch_select_indices(rows)
            first = self.model.get_input_embeddings()(tried.first[rows, None])  # [R, 1, D]
            mask = torch.nn.functional.pad(attention_mask[rows], (0, 1), value=1)
            rest = self._continue(first, mask, tried.cache, self.decoding(decoding.max_new_tokens - 1))
            for row, more in zip(open_rows, rest, strict=True):
                answers[row] += more
        return answers

    def _padded(self, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Token ids padded on the left and their mask, [B, T] each, on the model's device."""
        width = max(map(len, prompts))
        input_ids = torch.full((len(prompts), width), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = prompt
            attention_mask[row, width - len(prompt) :] = 1
        return input_ids.to(self.model.device), attention_mask.to(self.model.device)

    def _cut(self, output: Tensor) -> list[list[int]]:
        """Generated rows [B, N] up to their first stop token; the rest is padding while other rows continue."""
        return [list(takewhile(lambda token: token not in self.stop_token_ids, row)) for row in output.tolist()]


def _longest(prompts: Sequence[Tensor], images: Sequence[Tensor | None]) -> int:
    """At least the number of positions of the longest prompt."""
    return max(map(len, prompts)) + max(0 if visual is None else visual.shape[:2].numel() for visual in images)


def _joined(images: Sequence[Tensor | None]) -> Tensor | None:
    """The visual tokens [I, K, D] of all prompts; None if there are none."""
    visual = [tokens for tokens in images if tokens is not None]
    return torch.cat(visual) if visual else None
