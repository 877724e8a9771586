"""Different vision towers: what the bridge computes, and every tower with every other."""

import functools
import itertools

import pytest
import torch

from tests.distill.conftest import make_batch
from tests.tiny import tiny_llava
from tinyllava_switchkd.distill import build_distiller
from tinyllava_switchkd.distill.bridge import Layout, resampling

TOWERS = {
    "siglip": {"tower": "siglip"},
    "siglip, all tokens": {"tower": "siglip", "vision_feature_select_strategy": "cls_patch"},
    "siglip2": {"tower": "siglip2"},
    "clip, wide": {"tower": "clip", "vision": {"hidden": 48}},
    "clip with class token": {"tower": "clip", "vision_feature_select_strategy": "cls_patch"},
    "dinov2, coarse": {"tower": "dinov2", "vision": {"patch_size": 14}},
    "mof": {"tower": "mof"},
    "timm": {"tower": "timm"},
    "open_clip": {"tower": "open_clip", "vision": {"hidden": 16}},
}


@functools.cache
def student_of(name):
    """Cached, because tests leave no gradients and change no weights."""
    model = tiny_llava(seed=1, **TOWERS[name]).train().requires_grad_(True)
    model.freeze_unused_parameters()
    return model


@functools.cache
def teacher_of(name):
    return tiny_llava(seed=2, text={"hidden": 48}, **TOWERS[name])


@pytest.mark.parametrize(("ours", "theirs"), itertools.product(TOWERS, TOWERS))
def test_every_tower_learns_from_every_other(ours, theirs):
    for name in {ours, theirs} & {"timm", "open_clip"}:
        pytest.importorskip(name)
    student, teacher = student_of(ours), teacher_of(theirs)
    student.zero_grad()
    distiller = build_distiller(student, teacher, align_weight=0.0)
    batch = make_batch("ippaa", "pippiaaa", "pppaa", image_size=student.image_size)
    batch["teacher_images"] = make_batch("iii", image_size=teacher.image_size)["images"]
    if distiller.bridge is not None:
        explained = distiller.fit_bridge([batch])
        assert 0 < explained <= 1 + 1e-6
    losses = distiller(batch)
    losses["loss"].backward()
    reached = {name.split(".")[1] for name, p in distiller.named_parameters() if p.grad is not None and p.grad.any()}
    assert losses["visual_switch"] > 0
    assert "vision_tower" in reached and ("bridge" in reached) == (distiller.bridge is not None)
    assert all(name.startswith("student.") for name in distiller.state_dict() if "bridge" not in name)


def test_equal_towers_need_no_bridge(student, teacher):
    assert build_distiller(student, teacher).bridge is None


def test_the_least_squares_map_is_found():
    """The bridge is exact if the teacher's features are a linear map of the student's."""
    student, teacher = tiny_llava(seed=1), tiny_llava(seed=2, vision={"hidden": 48})
    distiller = build_distiller(student, teacher)
    matrix, offset = torch.randn(32, 48), torch.randn(48)
    seen = student.vision_features
    teacher.vision_features = lambda images: seen(images) @ matrix + offset
    assert distiller.fit_bridge([make_batch("ia", "iia", seed=seed) for seed in range(8)]) > 0.999
    other = make_batch("ia", seed=99)["images"]
    expected = teacher.vision_features(other)
    error = distiller.bridge(seen(other)) - expected
    assert error.square().mean() < 0.01 * expected.var()


class OfAnotherDevice(torch.Tensor):
    """A tensor that meets no other one until it is moved."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to and any(isinstance(arg, torch.device) for arg in args):
            return args[0].as_subclass(torch.Tensor).to(*args[1:], **(kwargs or {}))
        if any(type(arg) is torch.Tensor or type(arg) is torch.nn.Parameter for arg in args):
            raise RuntimeError("Expected all tensors to be on the same device")
        return super().__torch_function__(function, types, args, kwargs)


def test_a_bridge_is_fitted_to_models_on_other_devices():
    """With DeepSpeed the student is still on the CPU then, and the teacher already on the GPU."""
    bridges = [
        build_distiller(tiny_llava(seed=1), tiny_llava(seed=2, vision={"hidden": 48, "patch_size": 14})).bridge
        for _ in range(2)
    ]
    ours, theirs = torch.randn(3, bridges[0].resample.shape[1], 32), torch.randn(3, len(bridges[0].resample), 48)
    explained = bridges[0].fit([(ours, theirs)])
    assert bridges[1].fit([tuple(one.as_subclass(OfAnotherDevice) for one in (ours, theirs))]) == explained
    assert torch.equal(bridges[0].width.weight, bridges[1].width.weight)


def test_resampling_a_grid():
    """Compared with torch's interpolation, and checked by hand at the borders."""
    full = Layout(6, 1, 0, 0)
    picture = torch.randn(1, 1, 6, 6)
    for side, how in ((3, {"mode": "area"}), (12, {"mode": "bilinear", "align_corners": False}), (2, {"mode": "area"})):
        expected = torch.nn.functional.interpolate(picture, size=(side, side), **how)
        ours = resampling(full, Layout(side, 1, 0, 0)) @ picture.flatten()
        torch.testing.assert_close(ours, expected.flatten(), rtol=1e-5, atol=1e-6)
    siglip, clip, with_class = Layout(3, 1, 0, 1), Layout(3, 1, 1, 1), Layout(3, 1, 1, 0)
    assert resampling(clip, siglip).shape == (8, 9) and torch.equal(resampling(clip, siglip), torch.eye(9)[1:])
    weights = resampling(siglip, clip)  # the first patch is gone: its neighbours right and below stand in
    assert weights.shape == (9, 8) and torch.equal(weights[1:], torch.eye(8))
    assert torch.equal(weights[0].nonzero()[:, 0], torch.tensor([0, 2])) and weights[0].sum() == 1
    weights = resampling(clip, with_class)  # no class token of its own: the mean of its patches
    assert torch.allclose(weights[0], torch.full((9,), 1 / 9)) and torch.equal(weights[1:], torch.eye(9))
    mixture = resampling(clip, Layout(3, 2, 1, 1))
    assert mixture.shape == (18, 9) and torch.equal(mixture[0], mixture[1])
    for one, other in itertools.product((siglip, clip, with_class, full, Layout(5, 2, 1, 0)), repeat=2):
        assert torch.allclose(resampling(one, other).sum(1), torch.ones(1)), (one, other)


def test_text_only_batches_reach_the_bridge(student):
    distiller = build_distiller(student, tiny_llava(vision={"hidden": 48}))
    distiller(make_batch("ppaa"))["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in distiller.bridge.parameters())


def test_unequal_numbers_of_visual_tokens_keep_each_models_own_layout(student, batch):
    """Answers are compared position by position although the two sequences differ in length."""
    teacher = tiny_llava(seed=2, vision={"patch_size": 14})
    paths = build_distiller(student, teacher).pathway_logits(batch)
    out = teacher(**batch)
    where = out.labels[:, 1:] != -100
    torch.testing.assert_close(paths.teacher, out.logits[:, :-1][where], rtol=1e-4, atol=1e-5)
