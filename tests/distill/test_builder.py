import logging

import pytest
import torch

from tests.tiny import tiny_llava, tiny_tokenizer
from tinyllava_switchkd.distill import build_distiller


def refused(student, teacher, *words, **kwargs):
    with pytest.raises(ValueError) as error:
        build_distiller(student, teacher, **kwargs)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_fitting_models_are_accepted(student, teacher):
    distiller = build_distiller(
        student, teacher, student_tokenizer=tiny_tokenizer(), teacher_tokenizer=tiny_tokenizer()
    )
    assert distiller.loss.temperature == 3.0
    assert (distiller.align_weight, distiller.switch_weight) == (1.0, 1.0)


def test_other_token_ids_are_refused(student, teacher):
    other = tiny_tokenizer()
    other.add_tokens(["zebra"])
    refused(student, teacher, "zebra", "264", "265", student_tokenizer=tiny_tokenizer(), teacher_tokenizer=other)
    refused(student, teacher, "zebra", student_tokenizer=other, teacher_tokenizer=tiny_tokenizer())


def test_other_special_tokens_are_refused(student, teacher):
    tokenizers = {"student_tokenizer": tiny_tokenizer("qwen2"), "teacher_tokenizer": tiny_tokenizer("qwen2_instruct")}
    refused(student, teacher, "eos_token", "<|endoftext|>", "<|im_end|>", **tokenizers)


def test_the_tokenizers_of_loaded_models_are_compared(student, teacher):
    student.tokenizer, teacher.tokenizer = tiny_tokenizer("qwen2"), tiny_tokenizer("qwen2_instruct")
    refused(student, teacher, "eos_token")


def test_other_widths_are_refused_for_the_switch_only(student):
    teacher = tiny_llava(vision={"hidden": 48})
    refused(student, teacher, "width 32", "48", "--bridge auto", bridge="none")
    refused(student, teacher, "'maybe'", "auto, none", bridge="maybe")
    assert build_distiller(student, teacher, switch_weight=0.0, bridge="none").switch_weight == 0.0
    assert build_distiller(student, teacher, switch_weight=0.0).bridge is None


def test_other_templates_are_refused(student, teacher):
    student.config.template, teacher.config.template = "phi", "qwen2_base"
    refused(student, teacher, "'phi'", "'qwen2_base'", "use the teacher's template")
    teacher.config.template = "pretrain"
    refused(student, teacher, "The teacher has only been pre-trained", "'phi'", "give the folder of its fine-tuning")
    student.config.template = "pretrain"
    build_distiller(student, teacher)


def prepared_differently(distiller, batch, *words):
    """The pair is accepted, describes its difference, and needs every image preprocessed for both models."""
    assert all(word in distiller.pixel_difference for word in words), distiller.pixel_difference
    with pytest.raises(ValueError, match="teacher_images"):
        distiller(batch)
    distiller({**batch, "teacher_images": batch["images"]})


def test_other_image_sizes_need_two_preparations(student, batch):
    teacher = tiny_llava(vision={"image_size": 56, "patch_size": 14})
    distiller = build_distiller(student, teacher)
    assert "28" in distiller.pixel_difference and "56" in distiller.pixel_difference
    with pytest.raises(ValueError, match="teacher_images"):
        distiller(batch)
    larger = torch.nn.functional.interpolate(batch["images"], scale_factor=2)
    losses = distiller({**batch, "teacher_images": larger})
    assert losses["align"] > 0 and losses["visual_switch"] > 0


def test_other_aspect_ratios_need_two_preparations(student, teacher, batch):
    student.config.image_aspect_ratio, teacher.config.image_aspect_ratio = "pad", "square"
    prepared_differently(build_distiller(student, teacher), batch, "'pad'", "'square'")


def test_other_pixels_need_two_preparations(student, teacher, batch):
    ours, theirs = student.vision_tower.image_processor, teacher.vision_tower.image_processor
    theirs.image_mean = [0.1, 0.2, 0.3]
    processors = {"student_image_processor": ours, "teacher_image_processor": theirs}
    prepared_differently(build_distiller(student, teacher, **processors), batch, "image_mean", "0.1")


def test_what_changes_no_pixel_and_what_only_pixels_show(student, teacher, batch):
    """The data set decides by pixels whether a batch has those of the teacher; so does the distiller."""
    ours, theirs = student.vision_tower.image_processor, teacher.vision_tower.image_processor
    processors = {"student_image_processor": ours, "teacher_image_processor": theirs}
    student.config.image_aspect_ratio, teacher.config.image_aspect_ratio = None, "square"
    for processor, side in ((ours, 28), (theirs, 30)):
        processor.crop_size, processor.do_center_crop = {"height": side, "width": side}, False
    distiller = build_distiller(student, teacher, **processors)
    assert distiller.pixel_difference is None and distiller(batch)["loss"] > 0
    theirs.crop_size, theirs.rescale_factor = ours.crop_size, 1 / 300
    prepared_differently(build_distiller(student, teacher, **processors), batch, "pixels")


def test_a_model_is_not_its_own_teacher(student):
    refused(student, student, "same object")


@pytest.mark.parametrize("weights", [{"align_weight": -1.0}, {"switch_weight": float("nan")}])
def test_weights_must_be_numbers_from_zero(student, teacher, weights):
    refused(student, teacher, next(iter(weights)), **weights)


def test_settings_that_a_loss_does_not_take_are_refused(student, teacher):
    refused(student, teacher, "'dbild'", "top_k", loss="dbild", top_k=4)
    assert build_distiller(student, teacher, loss="bild_rkl", top_k=4).loss.top_k == 4


def test_a_switch_that_trains_nothing_is_pointed_out(student, teacher, caplog):
    student.vision_tower.requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        build_distiller(student, teacher)
    assert "vision tower is frozen" in caplog.text
