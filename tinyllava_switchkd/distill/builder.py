"""Build a distiller from a teacher and a student, after checking that they fit each other.

The switch passes one model's visual features to the other and compares logits token by token. A mismatch would not fail
but silently teach nonsense, so everything that must agree is checked here, before the first step.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tinyllava_switchkd.data.image import ImagePreprocess
from tinyllava_switchkd.distill.bridge import Bridge, differ, layout_of
from tinyllava_switchkd.distill.distiller import Distiller
from tinyllava_switchkd.distill.methods import Method, MethodFactory

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

logger = logging.getLogger(__name__)

BRIDGES = ("auto", "none")
"""Whether vision towers with other feature shapes get a trained bridge."""


def build_distiller(
    student: TinyLlava,
    teacher: TinyLlava,
    method: str | Method = "switch_kd",
    *,
    chunk_size: int | None = None,
    packing: bool = False,
    student_tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    student_image_processor: BaseImageProcessor | None = None,
    teacher_image_processor: BaseImageProcessor | None = None,
    bridge: str = "auto",
    gradient_checkpointing: bool = False,
    **settings: object,
) -> Distiller:
    """Build a `Distiller` from two compatible TinyLLaVA models.

    Args:
        student: the model to train; the caller chooses its trainable parameters (`requires_grad`).
        teacher: frozen here.
        method: a registered distillation method, or an instance of one.
        chunk_size: number of tokens whose logits exist at a time; None chooses it by the vocabulary.
        packing: concatenate the samples of a batch without padding (see `Task`).
        student_tokenizer: compared with `teacher_tokenizer` id by id; a loaded model's own if not given. If either is
            unknown, nothing is compared, and the longer output head is cut to the shorter.
        teacher_tokenizer: see `student_tokenizer`.
        student_image_processor: compared with `teacher_image_processor` (see `pixel_difference`); a loaded model's own
            if not given.
        teacher_image_processor: see `student_image_processor`.
        bridge: "auto" adds a trained `Bridge` if the method has a switch and the vision towers differ in width or grid
            (fit it with `Distiller.fit_bridge` before training); "none" refuses such a pair.
        gradient_checkpointing: checkpoint activations in the student and in the teacher's switch pass.
        settings: of the method and its loss (`loss`, `temperature`, `align_weight`, `switch_weight`, `top_k`, ...).

    Raises:
        ValueError: an unknown method, loss or setting, a wrong value, or models that do not fit each other; one
            sentence that names both sides' values.
    """
    if isinstance(method, str):
        method = MethodFactory(method).create(**settings)
    elif settings:
        raise ValueError(f"The method is already an instance, so {', '.join(sorted(settings))} cannot be set here.")
    method.terms  # noqa: B018 (reports wrong settings of a loss first)
    check_compatible(
        student,
        teacher,
        method,
        student_tokenizer=student_tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        bridge=bridge,
    )
    adapters = dict(method.adapters(student, teacher))
    if _needs_bridge(student, teacher, method, bridge):
        adapters["bridge"] = Bridge(student, teacher)
    like = student.get_input_embeddings().weight
    distiller = Distiller(
        student,
        teacher,
        method,
        vocab_size=min(_head_rows(student), _head_rows(teacher)),
        adapters={name: one.to(like.device, like.dtype) for name, one in adapters.items()},
        chunk_size=chunk_size,
        packing=packing,
        pixel_difference=pixel_difference(student, teacher, student_image_processor, teacher_image_processor),
    )
    if gradient_checkpointing:
        distiller.gradient_checkpointing_enable()
    if method.switch and not any(p.requires_grad for p in student.vision_tower.parameters()):
        logger.warning(
            "The student's vision tower is frozen, so the visual-switch loss is only logged and trains nothing; "
            "train the vision tower, or set switch_weight to 0 to save its pass through the teacher."
        )
    return distiller


def check_compatible(
    student: TinyLlava,
    teacher: TinyLlava,
    method: Method,
    *,
    student_tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    bridge: str = "auto",
) -> None:
    """Refuse a pair of models that do not fit each other (Switch-KD Section 5); arguments as in `build_distiller`.

    Models may be on the meta device.

    Raises:
        ValueError: names the first difference and both sides' values.
    """
    if student is teacher:
        raise ValueError("Student and teacher are the same object; load the teacher a second time to distil from it.")
    _check_tokenizers(
        student_tokenizer or getattr(student, "tokenizer", None),
        teacher_tokenizer or getattr(teacher, "tokenizer", None),
    )
    _check_templates(student.config, teacher.config)
    method.check(student, teacher)
    _needs_bridge(student, teacher, method, bridge)


def _needs_bridge(student: TinyLlava, teacher: TinyLlava, method: Method, bridge: str) -> bool:
    """Whether the switch needs a bridge.

    Raises:
        ValueError: it needs one, but `bridge` is "none" or none can be made; or `bridge` has another value.
    """
    if bridge not in BRIDGES:
        raise ValueError(f"bridge is {bridge!r}; it must be one of {', '.join(BRIDGES)}.")
    difference = differ(student, teacher) if method.switch else None
    if difference is None:
        return False
    if bridge == "none":
        raise ValueError(
            f"{difference[0].upper()}{difference[1:]}; use the same vision tower for both, train a bridge (--bridge "
            f"auto), or set switch_weight to 0 to distil without the switch."
        )
    for model in (student, teacher):
        layout_of(model)
    return True


def _check_tokenizers(student: PreTrainedTokenizerBase | None, teacher: PreTrainedTokenizerBase | None) -> None:
    if student is None or teacher is None:
        return
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        token, _ = min(ours.items() ^ theirs.items(), key=lambda item: (item[1], item[0]))
        raise ValueError(
            f"Student and teacher use different vocabularies of {len(ours)} and {len(theirs)} tokens ({token!r} has id "
            f"{ours.get(token, 'none')} for the student, {theirs.get(token, 'none')} for the teacher); logits can only "
            f"be compared over the same token ids, so choose a teacher of the same family."
        )
    for name in ("bos_token", "eos_token"):
        mine, other = getattr(student, name, None), getattr(teacher, name, None)
        if mine != other:
            raise ValueError(
                f"Student and teacher use different special tokens: {name} is {mine!r} for the student and {other!r} "
                f"for the teacher; choose both from the base models or both from the instruct models."
            )


def _check_templates(student: object, teacher: object) -> None:
    ours, theirs = (getattr(config, "template", None) for config in (student, teacher))
    # Captions of the pre-training stage are not conversations, so they suit any teacher.
    if ours and theirs and ours != theirs and ours != "pretrain":
        if theirs == "pretrain":
            raise ValueError(
                f"The teacher has only been pre-trained (its template is 'pretrain', the student's {ours!r}); give the "
                f"folder of its fine-tuning."
            )
        raise ValueError(
            f"The student trains with the conversation template {ours!r}, but the teacher was trained with {theirs!r}; "
            f"use the teacher's template for the student (CONV_VERSION {theirs})."
        )


def _head_rows(model: TinyLlava) -> int:
    return model.language_model.get_output_embeddings().weight.shape[0]


def pixel_difference(
    student: TinyLlava,
    teacher: TinyLlava,
    student_image_processor: BaseImageProcessor | None = None,
    teacher_image_processor: BaseImageProcessor | None = None,
) -> str | None:
    """How the image preprocessing of two models differs, in words; None if it is the same.

    If it differs, every image must be preprocessed twice, into the batch's `images` and `teacher_images`.

    Args:
        student: a TinyLLaVA, on any device.
        teacher: likewise.
        student_image_processor: a loaded model's own if not given. If both are known, pixels decide, as in the data
            set; otherwise only the configurations are compared.
        teacher_image_processor: likewise.
    """
    student_image_processor = student_image_processor or getattr(student, "image_processor", None)
    teacher_image_processor = teacher_image_processor or getattr(teacher, "image_processor", None)
    known = student_image_processor is not None and teacher_image_processor is not None
    ours, theirs = (getattr(model.config, "image_aspect_ratio", None) for model in (student, teacher))
    if known:
        mine = ImagePreprocess(student_image_processor, SimpleNamespace(image_aspect_ratio=ours))
        other = ImagePreprocess(teacher_image_processor, SimpleNamespace(image_aspect_ratio=theirs or ours))
        if other.makes_same_pixels(mine):
            return None
    if student.image_size != teacher.image_size:
        return f"images of {student.image_size} pixels for the student and of {teacher.image_size} for the teacher"
    if None not in (ours, theirs) and ours != theirs:
        return f"image_aspect_ratio {ours!r} for the student and {theirs!r} for the teacher"
    if not known:
        return None
    for name in ("image_mean", "image_std", "size", "crop_size", "do_center_crop", "resample"):
        ours, theirs = (_plain(getattr(one, name, None)) for one in (student_image_processor, teacher_image_processor))
        if ours is not None and theirs is not None and ours != theirs:
            return f"{name} {ours} for the student and {theirs} for the teacher"
    return "other pixels of the same image"


def _plain(value: Any) -> Any:  # makes settings of transformers' image processors comparable
    if isinstance(value, (list, tuple)):
        return [round(float(x), 6) for x in value]
    return dict(value) if hasattr(value, "keys") else value
