"""The three pathways of Switch-KD, from a batch to losses.

    teacher         z^T      = L^T(P^T(V^T(image)), text)        no gradient
    student         z^S      = L^S(P^S(V^S(image)), text)        all of the student
    visual switch   z^Switch = L^T(P^T(V^S(image)), text)        through the frozen L^T and P^T into V^S only

    loss = CE(z^S) + align_weight * DBiLD(z^T, z^S) + switch_weight * DBiLD(z^T, z^Switch)

V: vision tower, P: connector, L: language model (Switch-KD Section 3.2, Figure 2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tinyllava_switchkd.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinyllava_switchkd.model.quantized import is_quantized, keep_differentiable
from tinyllava_switchkd.model.splice import Spliced, image_of_placeholder, splice

from .chunked import PARTS, SupervisedTokens, TokenLoss
from .losses import LogitLoss


class PathwayLogits(NamedTuple):
    """Logits of the supervised tokens, row by row of the batch, over the shared vocabulary: [tokens, vocab] each."""

    teacher: Tensor
    student: Tensor
    visual_switch: Tensor


class Positions(NamedTuple):
    """Where hidden states predict a supervised token: `rows`, `columns` [tokens], those of samples with images first.

    `labels` [tokens] are the tokens predicted, `order` [tokens] maps into row-by-row order, `images` counts the tokens
    of samples with images.
    """

    rows: Tensor
    columns: Tensor
    labels: Tensor
    order: Tensor
    images: int


class SupervisedTask(nn.Module):
    """Plain supervised training (PT, SFT) of a TinyLLaVA: cross-entropy through the same door as distillation.

    Called with a batch it returns named losses, of which "loss" is to be minimised and the rest to be logged.

    Args:
        student: the model to train.
        chunk_size: supervised tokens whose logits exist at one time; None chooses by the vocabulary.
        packing: lay the samples of a batch end to end for the language models, so that no padding is computed. It pays
            with flash attention; other attention computes (and masks) what one sample would see of another.
    """

    def __init__(self, student: nn.Module, chunk_size: int | None = None, packing: bool = False) -> None:
        super().__init__()
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 token, not {chunk_size}.")
        self.student = student
        self.chunk_size = chunk_size
        self.packing = packing

    @property
    def config(self) -> Any:
        """The student's configuration (DeepSpeed's "auto" values read its hidden size)."""
        return self.student.config

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.student.gradient_checkpointing_enable(**kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.student.gradient_checkpointing_disable()

    def forward(self, batch: Mapping[str, Any], num_items_in_batch: Tensor | int | None = None) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            batch: `input_ids` [samples, tokens] with -200 where an image goes, `labels` alike with -100 where nothing
                is supervised, `attention_mask` alike (optional), `images` [images, 3, height, width].
            num_items_in_batch: supervised tokens of the whole optimiser step (all micro-batches, all ranks), by which
                the sums over this batch's tokens are divided; None divides by this batch's own.

        Returns:
            "loss" with gradient; "ce" and "supervised_tokens" without.
        """
        features = self.student.vision_features(_images(batch, self.student))
        spliced, positions = self._student_inputs(batch, features)
        student = self._hidden_states(self.student, spliced, positions.rows, positions.columns)
        head = TokenLoss(self.student.language_model.get_output_embeddings(), chunk_size=self.chunk_size)
        total, parts = head(SupervisedTokens(student, positions.labels))
        return _normalised(total, parts[:1], ("ce",), positions, num_items_in_batch)

    def _student_inputs(self, batch: Mapping[str, Any], features: Tensor) -> tuple[Spliced, Positions]:
        spliced = _splice(self.student, batch, self.student.connector(features))
        return spliced, _positions(batch["input_ids"], spliced)

    def _hidden_states(self, model: nn.Module, spliced: Spliced, rows: Tensor, columns: Tensor) -> Tensor:
        """Last hidden states [positions, width] of a language model, before its head.

        Padded samples stand on the left, so the causal mask alone keeps padding out of what real tokens see, and
        attention takes its fastest path. Packed ones are told apart by positions that begin anew; the lengths spare
        flash attention the search for them.
        """
        decoder = model.language_model.get_decoder()
        if not self.packing:
            return decoder(inputs_embeds=spliced.inputs_embeds, use_cache=False).last_hidden_state[rows, columns]
        is_token = spliced.attention_mask.bool()
        ends = nn.functional.pad(is_token.sum(1).cumsum(0), (1, 0))  # [samples + 1]
        longest = is_token.shape[1]
        hidden = decoder(
            inputs_embeds=spliced.inputs_embeds[is_token][None],
            position_ids=spliced.position_ids[is_token][None],
            use_cache=False,
            cu_seq_lens_q=ends.int(),
            cu_seq_lens_k=ends.int(),
            max_length_q=longest,
            max_length_k=longest,
        ).last_hidden_state
        return hidden[0, ends[rows] + columns]


class SwitchDistiller(SupervisedTask):
    """Switch-KD: a student learns from a frozen teacher, its vision tower also through the teacher's language model.

    `student` is the only registered sub-module. The teacher follows `.to()` but is in neither `parameters()` nor
    `state_dict()`: no optimiser, checkpoint or ZeRO stage ever sees it. A quantised teacher does not follow: it stays
    on the device and in the precision that it was loaded with. Build one with `build_distiller`.

    Args:
        student: the model to train.
        teacher: the model to learn from; frozen here.
        loss: the distillation loss between logits.
        align_weight: lambda_1.
        switch_weight: lambda_2; 0 leaves the switch pass out.
        vocab_size: number of leading token ids that both vocabularies share.
        chunk_size: supervised tokens whose logits exist at one time; None chooses by the vocabulary.
        packing: see `SupervisedTask`; all three pathways are packed alike.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loss: nn.Module,
        *,
        vocab_size: int,
        align_weight: float = 1.0,
        switch_weight: float = 1.0,
        chunk_size: int | None = None,
        packing: bool = False,
    ) -> None:
        super().__init__(student, chunk_size, packing)
        if any(True for _ in loss.parameters()):
            self.loss = loss
        else:
            # Not registered: ZeRO-3 expects every rank to call every module as often, but a rank without images calls
            # the loss less often, and would wait for the others forever.
            object.__setattr__(self, "loss", loss)
        self.align_weight = align_weight
        self.switch_weight = switch_weight
        self.vocab_size = vocab_size
        teacher.requires_grad_(False).eval()
        _remove_dropout(teacher)
        keep_differentiable(teacher)
        object.__setattr__(self, "_teacher", teacher)
        self._one_encoder = _is_frozen(student.vision_tower) and _see_alike(student, teacher)

    @property
    def teacher(self) -> nn.Module:
        return self._teacher

    def _apply(self, fn, *args, **kwargs):
        if not is_quantized(self._teacher):
            self._teacher._apply(fn, *args, **kwargs)
        if "loss" not in self._modules:
            self.loss._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Activation checkpointing in the student, and in the teacher's language model for the switch pass."""
        super().gradient_checkpointing_enable(**kwargs)
        if getattr(self._teacher, "is_loaded_in_8bit", False):
            # bitsandbytes' 8-bit layers keep their inputs past the hooks by which the non-reentrant kind frees them.
            chosen = {**(kwargs.get("gradient_checkpointing_kwargs") or {}), "use_reentrant": True}
            kwargs = {**kwargs, "gradient_checkpointing_kwargs": chosen}
        self._teacher.language_model.gradient_checkpointing_enable(**kwargs)

    def gradient_checkpointing_disable(self) -> None:
        super().gradient_checkpointing_disable()
        self._teacher.language_model.gradient_checkpointing_disable()

    def forward(self, batch: Mapping[str, Any], num_items_in_batch: Tensor | int | None = None) -> dict[str, Tensor]:
        """Losses of a batch (see `SupervisedTask.forward`).

        Returns:
            "loss" = ce + align_weight * align + switch_weight * visual_switch, with gradient; without: these three
            unweighted, "supervised_tokens", and means over tokens of "knee_teacher", "knee_student" (the k of each
            leader in the align term) and "topk_overlap" (share of the teacher's k tokens that are among the student's).
        """
        tokens, positions = self._tokens(batch)
        total, parts = self._token_loss()(tokens)
        ranks = isinstance(self.loss, LogitLoss) and type(self.loss).order is not LogitLoss.order
        names = PARTS if ranks else PARTS[:3]
        return _normalised(total, parts, names, positions, num_items_in_batch)

    def _token_loss(self) -> TokenLoss:
        return TokenLoss(
            self.student.language_model.get_output_embeddings(),
            self._teacher.language_model.get_output_embeddings(),
            self.loss,
            vocab_size=self.vocab_size,
            align_weight=self.align_weight,
            switch_weight=self.switch_weight,
            chunk_size=self.chunk_size,
        )

    @torch.no_grad()
    def pathway_logits(self, batch: Mapping[str, Any]) -> PathwayLogits:
        """Dense logits of the three pathways, for inspection and tests; the teacher's where a sample has no image."""
        tokens, positions = self._tokens(batch, always_switch=True)
        head = self._teacher.language_model.get_output_embeddings()
        student = self.student.language_model.get_output_embeddings()(tokens.student)
        teacher = head(tokens.teacher)
        switch = teacher
        if tokens.switch is not None:
            switch = torch.cat([head(tokens.switch), teacher[positions.images :]])
        in_batch_order = positions.order.argsort()
        return PathwayLogits(*(logits[in_batch_order, : self.vocab_size] for logits in (teacher, student, switch)))

    def _tokens(self, batch: Mapping[str, Any], always_switch: bool = False) -> tuple[SupervisedTokens, Positions]:
        """Hidden states of the supervised positions along the three pathways."""
        images = _images(batch, self.student)
        features = self.student.vision_features(images)  # V^S(image) [images, patches, width], for student and switch
        spliced, positions = self._student_inputs(batch, features)
        student = self._hidden_states(self.student, spliced, positions.rows, positions.columns)
        teacher = self._teacher_tokens(batch, images, features, spliced, positions)
        switch = None
        if positions.images and (self.switch_weight or always_switch):
            switch = self._switch_tokens(batch, features, positions)
        return SupervisedTokens(student, positions.labels, teacher, switch), positions

    @torch.no_grad()
    def _teacher_tokens(
        self, batch: Mapping[str, Any], images: Tensor, features: Tensor, student: Spliced, positions: Positions
    ) -> Tensor:
        teacher, visual = self._teacher, None
        if not len(positions.labels):
            return next(teacher.parameters()).new_zeros(0, teacher.config.hidden_size)
        if (batch["input_ids"] == IMAGE_TOKEN_INDEX).any():
            if not (self._one_encoder and _is_frozen(self.student.vision_tower)):
                features = teacher.vision_features(images)
            visual = teacher.connector(_like_weights(features, teacher.connector))
        spliced = _splice(teacher, batch, visual, student)
        return self._hidden_states(teacher, spliced, positions.rows, positions.columns)

    def _switch_tokens(self, batch: Mapping[str, Any], features: Tensor, positions: Positions) -> Tensor:
        """Hidden states of the teacher that sees through the student's vision tower; text-only samples are left out."""
        with_image = (batch["input_ids"] == IMAGE_TOKEN_INDEX).any(1)
        part = {key: batch[key][with_image] for key in _TEXT_KEYS if batch.get(key) is not None}
        spliced = _splice(
            self._teacher, part, self._teacher.connector(_like_weights(features, self._teacher.connector))
        )
        row_of = with_image.cumsum(0) - 1  # row in the batch -> row among the samples with images
        rows, columns = row_of[positions.rows[: positions.images]], positions.columns[: positions.images]
        with _checkpointing(self._teacher.language_model):
            return self._hidden_states(self._teacher, spliced, rows, columns)


_TEXT_KEYS = ("input_ids", "labels", "attention_mask")


def _images(batch: Mapping[str, Any], model: nn.Module) -> Tensor:
    """The images that placeholders stand for, in order [images, 3, height, width]; one dummy if there are none.

    A dummy keeps the vision tower in every rank's graph. TinyLLaVA v1 gives each text-only sample one of its own
    (`modeling_tinyllava.py`); of these all but the needed are dropped.
    """
    images = batch.get("images")
    if images is None or len(images) == 0:
        images = torch.zeros(1, 3, model.image_size, model.image_size, device=batch["input_ids"].device)
    images = torch.stack(list(images)) if isinstance(images, (list, tuple)) else images
    placeholders = batch["input_ids"] == IMAGE_TOKEN_INDEX
    if batch.get("attention_mask") is not None:
        placeholders = placeholders & batch["attention_mask"].bool()
    chosen = image_of_placeholder(placeholders, len(images))
    return images[chosen] if len(chosen) else images[:1]


def _splice(model: nn.Module, batch: Mapping[str, Any], visual: Tensor | None, like: Spliced | None = None) -> Spliced:
    spliced = splice(
        batch["input_ids"],
        batch.get("attention_mask"),
        batch["labels"],
        visual,
        model.get_input_embeddings(),
        padding_side="right",
    )
    if like is not None and spliced.labels.shape != like.labels.shape:
        raise ValueError(
            f"Teacher and student lay out the batch differently ({spliced.labels.shape[1]} and {like.labels.shape[1]} "
            f"tokens a sample): their vision towers or connectors give unequal numbers of visual tokens."
        )
    return spliced


def _positions(input_ids: Tensor, spliced: Spliced) -> Positions:
    """Positions whose next token is supervised."""
    predicts = (spliced.labels[:, 1:] != IGNORE_INDEX) & spliced.attention_mask[:, :-1].bool()
    rows, columns = predicts.nonzero(as_tuple=True)
    text_only = ~(input_ids == IMAGE_TOKEN_INDEX).any(1)
    order = text_only[rows].long().argsort(stable=True)
    rows, columns = rows[order], columns[order]
    return Positions(rows, columns, spliced.labels[rows, columns + 1], order, int((~text_only[rows]).sum()))


def _is_frozen(module: nn.Module) -> bool:
    return not any(p.requires_grad for p in module.parameters())


def _see_alike(student: nn.Module, teacher: nn.Module) -> bool:
    """Whether two vision towers give the same features of an image, so that one pass serves both models."""
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        if getattr(student.config, name) != getattr(teacher.config, name):
            return False
    ours, theirs = student.vision_tower.state_dict(), teacher.vision_tower.state_dict()
    return ours.keys() == theirs.keys() and all(
        weight.numel()  # ZeRO-3 leaves empty ones
        and weight.shape == theirs[name].shape
        and torch.equal(weight.to(theirs[name]), theirs[name])
        for name, weight in ours.items()
    )


def _like_weights(features: Tensor, module: nn.Module) -> Tensor:
    """Features in the dtype of a module's floating weights (a bfloat16 teacher reads a float32 student's)."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), features)
    return features.to(weight.dtype)


@contextmanager
def _checkpointing(language_model: nn.Module) -> Iterator[None]:
    """transformers 5 checkpoints activations only in training mode; the teacher is in it just for the switch pass."""
    language_model.train(any(getattr(module, "gradient_checkpointing", False) for module in language_model.modules()))
    try:
        yield
    finally:
        language_model.eval()


def _remove_dropout(model: nn.Module) -> None:
    """A teacher in training mode must still give the same logits."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _normalised(
    total: Tensor, parts: Tensor, names: tuple[str, ...], positions: Positions, num_items_in_batch: Tensor | int | None
) -> dict[str, Tensor]:
    tokens = len(positions.labels)
    divisor = max(tokens, 1) if num_items_in_batch is None else num_items_in_batch
    losses = {"loss": total / divisor}
    for name, part in zip(names, parts, strict=False):
        losses[name] = part / (max(tokens, 1) if name in PARTS[3:] else divisor)
    losses["supervised_tokens"] = torch.tensor(tokens, device=total.device)
    return losses
