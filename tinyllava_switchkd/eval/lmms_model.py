"""The model class for lmms-eval: any task with images or text, in batches padded on the left. Needs lmms-eval."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tinyllava_switchkd.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from tinyllava_switchkd.data.template.base import exchange
from tinyllava_switchkd.data.text import TextPreprocess
from tinyllava_switchkd.eval.generate import Answerer

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 16
DEFAULT_MAX_NEW_TOKENS = 1024
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")
"""The keys of a task's generation_kwargs that are used besides `max_new_tokens` and `until`."""


class TinyLlavaSwitchKD(lmms):
    """A checkpoint of this package under lmms-eval's "simple" interface.

    A request's arguments are (context, generation kwargs, doc_to_visual, doc id, task, split). Conversation template
    and image policy are the checkpoint's own. A task's `image_aspect_ratio` is meant for other models and is ignored.

    Args:
        pretrained: checkpoint, a folder or a hub repository.
        template: conversation template; the checkpoint's own by default.
        image_aspect_ratio: "square" or "pad"; the checkpoint's own by default.
        dtype: auto, float32, float16 or bfloat16.
        attn_implementation: as in transformers.
        device: the default is this process's GPU if there is one, else the CPU.
        batch_size: requests at once; "auto" is 16. The size is halved when memory runs out.
        max_batch_size: limit of `batch_size` (part of lmms-eval's interface).
        conv_mode: LLaVA's name of `template`.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        template: str | None = None,
        image_aspect_ratio: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | str | None = None,
        conv_mode: str | None = None,
    ) -> None:
        super().__init__()
        size = DEFAULT_BATCH_SIZE if batch_size in (None, "auto") else int(batch_size)
        self.batch_size = size if max_batch_size is None else min(size, int(max_batch_size))
        # lmms-eval passes "cuda" or "cuda:0" to every process, but each must use its own GPU.
        own = None if device is None or str(device).startswith("cuda") else device
        self.answerer = Answerer.from_pretrained(
            pretrained,
            device=own,
            dtype=dtype,
            template=template or conv_mode,
            image_aspect_ratio=image_aspect_ratio,
            attn_implementation=attn_implementation,
        )
        self._with_answers = TextPreprocess(self.answerer.tokenizer, self.answerer.template)

    @property
    def device(self) -> torch.device:
        return self.answerer.model.device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers in the order of the requests; the longest requests are generated first."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        with tqdm(total=len(requests), desc="Generating", unit=" answers", disable=self.rank != 0) as bar:
            for numbers in groups.values():
                numbers.sort(key=lambda number: -len(requests[number].args[0]))
                for start in range(0, len(numbers), self.batch_size):
                    batch = numbers[start : start + self.batch_size]
                    answers = self._answer([requests[number].args for number in batch])
                    for number, text in zip(batch, answers, strict=True):
                        texts[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args[:2], text)
                    bar.update(len(batch))
        return texts

    def _answer(self, batch: Sequence[tuple]) -> list[str]:
        """Answers to requests with the same generation kwargs."""
        settings = dict(batch[0][1] or {})
        until = settings.get("until") or []
        sampling = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
        if not sampling.get("do_sample", sampling.get("temperature", 0) > 0):
            sampling = {name: sampling[name] for name in ("num_beams", "repetition_penalty") if name in sampling}
        else:
            sampling["do_sample"] = True
        images = [self._images(*request[2:]) for request in batch]
        prompts = [
            self.answerer.prompt_ids(self._text(request[0], len(of_request)), len(of_request))
            for request, of_request in zip(batch, images, strict=True)
        ]
        texts = self.answerer.answer(
            prompts, self._encode(images), int(settings.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS), **sampling
        )
        return [_cut(text, [until] if isinstance(until, str) else until) for text in texts]

    def _images(
        self, doc_to_visual: Callable[[object], list[Image.Image] | None], doc_id: int, task: str, split: str
    ) -> list[Image.Image]:
        """The pictures of a document.

        Raises:
            ValueError: it shows something other than pictures.
        """
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        for visual in visuals:
            if not isinstance(visual, Image.Image):
                raise ValueError(
                    f"The task {task} shows a {type(visual).__name__} (document {doc_id}), but this model sees only "
                    f"pictures: choose image tasks."
                )
        return visuals

    def _encode(self, images: Sequence[Sequence[Image.Image]]) -> list[Tensor | None]:
        """Visual tokens [n, K, D] of each request, None for a request without pictures."""
        flat = [self.answerer.pixels_of(image) for of_request in images for image in of_request]
        if not flat:
            return [None] * len(images)
        counts = [len(of_request) for of_request in images]
        parts = self.answerer.encode_images(torch.stack(flat)).split(counts)
        return [part if count else None for part, count in zip(parts, counts, strict=True)]

    @staticmethod
    def _text(context: str, num_images: int) -> str:
        """The context without image tokens; the pictures are put in front, as in training."""
        return context.replace(DEFAULT_IMAGE_TOKEN, "").strip() if num_images else context

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Mean cross-entropy of each target, including its end token, and whether greedy decoding would give it.

        By lmms-eval's convention it is a loss, not a likelihood: its multiple-choice tasks take the smallest.
        """
        results = []
        for request in tqdm(requests, desc="Scoring", disable=self.rank != 0):
            context, doc_to_target, doc_to_visual, doc_id, task, split = request.args
            document = self.task_dict[task][split][doc_id]
            target = doc_to_target if isinstance(doc_to_target, str) else doc_to_target(document)
            images = self._images(doc_to_visual, doc_id, task, split)
            results.append(self._loss(self._text(context, len(images)), str(target), images))
        return results

    @torch.inference_mode()
    def _loss(self, text: str, target: str, images: Sequence[Image.Image]) -> tuple[float, bool]:
        places = f"{DEFAULT_IMAGE_TOKEN}\n" * len(images)
        messages = exchange(places + text, target)
        sample = self._with_answers(messages, mode="train", num_images=len(images))
        [visual] = self._encode([images])
        output = self.answerer.model(
            input_ids=sample["input_ids"][None].to(self.device),
            labels=sample["labels"][None].to(self.device),
            image_features=visual,
        )
        targets = output.labels[:, 1:]  # [1, L-1]
        supervised = targets != IGNORE_INDEX
        greedy = output.logits[:, :-1].argmax(-1)  # [1, L-1]
        return float(output.loss), bool((greedy == targets)[supervised].all())

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("Tasks of several rounds are not supported by tinyllava_switchkd.")

    def clean(self) -> None:
        """Free the model's memory (lmms-eval does so before it starts a judge model)."""
        self.__dict__.pop("answerer", None)
        super().clean()


def _cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    ends = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends)].strip() if ends else text
