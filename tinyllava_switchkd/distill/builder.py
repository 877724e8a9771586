"""Teacher + student -> distiller, after checking that the two fit.

The switch feeds one model's visual features to another and compares logits token by token; whatever differs between
the two would not fail but silently teach nonsense. Everything that must agree is checked here, before the first step.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from .losses import LossFactory
from .switch import SwitchDistiller

logger = logging.getLogger(__name__)


def build_distiller(
    student: nn.Module,
    teacher: nn.Module,
    loss: str = "dbild",
    temperature: float = 3.0,
    align_weight: float = 1.0,
    switch_weight: float = 1.0,
    *,
    top_k: int | None = None,
    chunk_size: int | None = None,
    packing: bool = False,
    student_tokenizer: Any = None,
    teacher_tokenizer: Any = None,
    student_image_processor: Any = None,
    teacher_image_processor: Any = None,
    gradient_checkpointing: bool = False,
) -> SwitchDistiller:
    """A `SwitchDistiller` of two TinyLLaVA models that fit each other.

    Args:
        student: trained by the distiller's losses; what of it trains is the caller's choice (`requires_grad`).
        teacher: frozen here.
        loss: a registered distillation loss.
        temperature: tau of the distillation loss.
        align_weight: lambda_1, weight of loss(teacher, student).
        switch_weight: lambda_2, weight of loss(teacher, visual switch).
        top_k: for losses with a fixed number of logits (bild_*); None keeps the loss's own.
        chunk_size: supervised tokens whose logits exist at one time; None chooses by the vocabulary.
        packing: lay the samples of a batch end to end, without padding (see `SupervisedTask`).
        student_tokenizer: compared id by id with `teacher_tokenizer`; a loaded model's own if not given. Where one is
            unknown, nothing is compared and unequal heads are cut to the shorter.
        teacher_tokenizer: see `student_tokenizer`.
        student_image_processor: compared with `teacher_image_processor` in what they do to pixels; a loaded model's
            own if not given.
        teacher_image_processor: see `student_image_processor`.
        gradient_checkpointing: checkpoint activations in the student and in the teacher's switch pass.

    Raises:
        ValueError: an unknown loss, a negative weight, or models that can't be distilled into one another; one
            sentence that names both sides' values.
    """
    for name, weight in (("align_weight", align_weight), ("switch_weight", switch_weight)):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{name} must be a number of at least 0, not {weight}.")
    extra = {} if top_k is None else {"top_k": top_k}
    try:
        loss_module = LossFactory(loss)(temperature=temperature, **extra)
    except TypeError as error:
        raise ValueError(f"The distillation loss {loss!r} does not take these settings: {error}.") from error
    check_compatible(
        student,
        teacher,
        student_tokenizer=student_tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        student_image_processor=student_image_processor,
        teacher_image_processor=teacher_image_processor,
        switch=switch_weight > 0,
    )
    distiller = SwitchDistiller(
        student,
        teacher,
        loss_module,
        vocab_size=min(_head_rows(student), _head_rows(teacher)),
        align_weight=align_weight,
        switch_weight=switch_weight,
        chunk_size=chunk_size,
        packing=packing,
    )
    if gradient_checkpointing:
        distiller.gradient_checkpointing_enable()
    if switch_weight and not any(p.requires_grad for p in student.vision_tower.parameters()):
        logger.warning(
            "The student's vision tower is frozen, so the visual-switch loss is only reported and trains nothing; "
            "train the vision tower, or set switch_weight to 0 to save its pass through the teacher."
        )
    return distiller


def check_compatible(
    student: nn.Module,
    teacher: nn.Module,
    *,
    student_tokenizer: Any = None,
    teacher_tokenizer: Any = None,
    student_image_processor: Any = None,
    teacher_image_processor: Any = None,
    switch: bool = True,
) -> None:
    """Refuse a pair that can't be distilled (Switch-KD Section 5; `build_distiller` says what the arguments are).

    Raises:
        ValueError: with the first difference found and both sides' values.
    """
    if student is teacher:
        raise ValueError("Student and teacher are the same object; load the teacher a second time to distil from it.")
    _check_tokenizers(
        student_tokenizer or getattr(student, "tokenizer", None),
        teacher_tokenizer or getattr(teacher, "tokenizer", None),
    )
    _check_templates(student.config, teacher.config)
    ours, theirs = student.num_image_tokens, teacher.num_image_tokens
    if ours != theirs:
        raise ValueError(
            f"The student makes {ours} visual tokens of an image and the teacher {theirs}; their token sequences can "
            f"only be compared when vision tower, feature selection and connector give the same number."
        )
    if student.image_size != teacher.image_size:
        raise ValueError(
            f"The student reads images of {student.image_size} pixels and the teacher of {teacher.image_size}; both "
            f"must read the same ones."
        )
    _check_pixels(
        student_image_processor or getattr(student, "image_processor", None),
        teacher_image_processor or getattr(teacher, "image_processor", None),
    )
    aspects = [getattr(model.config, "image_aspect_ratio", None) for model in (student, teacher)]
    if None not in aspects and aspects[0] != aspects[1]:
        raise ValueError(
            f"The student prepares images with image_aspect_ratio {aspects[0]!r} and the teacher with {aspects[1]!r}; "
            f"train the student with --image_aspect_ratio {aspects[1]}."
        )
    if switch:
        _check_switch(student, teacher)


def _check_switch(student: nn.Module, teacher: nn.Module) -> None:
    width, expected = student.config.vision_hidden_size, teacher.config.vision_hidden_size
    if width != expected:
        raise ValueError(
            f"The student's vision tower gives features of width {width} and the teacher's connector takes {expected}; "
            f"give both the same vision tower, or set switch_weight to 0 to distil without the switch."
        )
    tokens, expected = (
        model.vision_tower.num_tokens(model.config.vision_feature_select_strategy) for model in (student, teacher)
    )
    if tokens != expected:
        raise ValueError(
            f"The student's vision tower gives {tokens} patch features of an image and the teacher's {expected}; give "
            f"both the same vision tower, or set switch_weight to 0 to distil without the switch."
        )


def _check_tokenizers(student: Any, teacher: Any) -> None:
    if student is None or teacher is None:
        return
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        token, index = next(
            (
                (token, index)
                for token, index in sorted(ours.items(), key=lambda item: item[1])
                if theirs.get(token) != index
            ),
            (None, None),
        )
        if token is None:
            token = next(token for token in theirs if token not in ours)
            detail = f"{token!r} is id {theirs[token]} of the teacher's and missing from the student's"
        else:
            detail = f"{token!r} is id {index} of the student's and {theirs.get(token, 'missing')} of the teacher's"
        raise ValueError(
            f"Student and teacher use different vocabularies of {len(ours)} and {len(theirs)} tokens ({detail}); "
            f"logits can only be compared over the same token ids, so choose a teacher of the same family."
        )
    for name in ("bos_token", "eos_token"):
        mine, other = getattr(student, name, None), getattr(teacher, name, None)
        if mine != other:
            raise ValueError(
                f"Student and teacher use different special tokens: {name} is {mine!r} for the student and {other!r} "
                f"for the teacher; choose both from the base models or both from the instruct models."
            )


def _check_templates(student: Any, teacher: Any) -> None:
    ours, theirs = (getattr(config, "conv_version", None) for config in (student, teacher))
    # Captions of the pre-training stage carry no conversation, so any teacher may read them.
    if ours and theirs and ours != theirs and ours != "pretrain":
        raise ValueError(
            f"The student trains with the conversation template {ours!r} and the teacher was trained with {theirs!r}; "
            f"use the teacher's template for the student (CONV_VERSION {theirs})."
        )


def _check_pixels(student: Any, teacher: Any) -> None:
    if student is None or teacher is None:
        return
    for name in ("image_mean", "image_std", "size", "crop_size", "do_center_crop", "resample"):
        ours, theirs = (_plain(getattr(processor, name, None)) for processor in (student, teacher))
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(
                f"Student and teacher prepare pixels differently: {name} is {ours} for the student and {theirs} for "
                f"the teacher; the switch needs both to see the same picture, so use the same vision tower."
            )


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [round(float(x), 6) for x in value]
    return dict(value) if hasattr(value, "keys") else value


def _head_rows(model: nn.Module) -> int:
    return model.language_model.get_output_embeddings().weight.shape[0]
