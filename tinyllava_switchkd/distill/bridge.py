"""The bridge from the student's vision features to the teacher's connector, for towers of other widths or grids.

Switch-KD leaves towers of other widths to future work (method.md section 2.3); this is our addition. The grid is
resampled with fixed weights. The width is mapped by a linear layer, which is initialised with the least-squares map
from the student's features to the teacher's and trained by the visual-switch loss. It is never part of the student.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

RIDGE = 1e-4
"""Regularisation: this share of the mean diagonal is added to the diagonal of the least-squares problem."""


class Layout(NamedTuple):
    """The meaning of a vision tower's tokens.

    Attributes:
        side: height and width of the patch grid.
        streams: encoders whose tokens alternate (2 in a mixture of features, otherwise 1).
        special: tokens before the patches of each encoder (class, registers).
        dropped: tokens dropped at the start; beyond the special tokens these are patches.
    """

    side: int
    streams: int
    special: int
    dropped: int

    @property
    def first_patch(self) -> int:
        """Index of the first patch that is not dropped (1 for SigLIP with v1's `patch`)."""
        return max(self.dropped - self.special, 0)

    @property
    def specials(self) -> int:
        """Number of special tokens that are not dropped."""
        return max(self.special - self.dropped, 0)


def layout_of(model: TinyLlava) -> Layout:
    """The layout of the tokens of a model's vision tower.

    Raises:
        ValueError: they are not a square grid of patches.
    """
    tower = model.vision_tower
    streams = 2 if hasattr(tower.config, "dinov2_config") else 1
    total = tower.num_tokens("cls_patch") // streams
    special = getattr(tower.config, "num_prefix_tokens", None)
    side = math.isqrt(total - (special or 0))
    special = total - side**2 if special is None else special
    if side**2 + special != total or not side:
        raise ValueError(
            f"The tokens of {model.config.vision_model_name_or_path} ({total} per image) are not a square grid of "
            f"patches, which a bridge between towers needs; set switch_weight to 0, or use the same tower for both."
        )
    kept = tower.num_tokens(model.config.vision_feature_select_strategy) // streams
    return Layout(side, streams, special, total - kept)


def differ(student: TinyLlava, teacher: TinyLlava) -> str | None:
    """How the shapes of two models' vision features differ, in words; None if the switch needs no bridge."""
    width, expected = student.config.vision_hidden_size, teacher.config.vision_hidden_size
    if width != expected:
        return (
            f"the student's vision tower gives features of width {width}, but the teacher's connector takes {expected}"
        )
    tokens, expected = (
        model.vision_tower.num_tokens(model.config.vision_feature_select_strategy) for model in (student, teacher)
    )
    if tokens != expected:
        return f"the student's vision tower gives {tokens} patch features per image, but the teacher's {expected}"
    return None


class Bridge(nn.Module):
    """Student features [images, patches, width] -> teacher features [images, its patches, its width].

    Args:
        student: a TinyLLaVA, on any device.
        teacher: likewise.

    Raises:
        ValueError: the tokens of a tower are not a square grid.
    """

    def __init__(self, student: TinyLlava, teacher: TinyLlava) -> None:
        super().__init__()
        ours, theirs = layout_of(student), layout_of(teacher)
        weights = None if ours == theirs else resampling(ours, theirs)
        self.resample: Tensor | None
        self.register_buffer("resample", weights, persistent=False)
        self.width = nn.Linear(student.config.vision_hidden_size, teacher.config.vision_hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.width(self._resampled(features).to(self.width.weight.dtype))

    def _resampled(self, features: Tensor) -> Tensor:
        return features if self.resample is None else self.resample.to(features.dtype) @ features

    @torch.no_grad()
    def fit(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Set the linear layer to the least-squares map from student features to teacher features.

        Args:
            pairs: (student features, teacher features) of the same images, batch by batch; on any devices.

        Returns:
            the share of the variance of the teacher features that the map explains on these images.
        """
        size = self.width.in_features + 1
        device = self.width.weight.device
        square = torch.zeros(size, size, dtype=torch.float64, device=device)
        cross, power, mean = square.new_zeros(size, self.width.out_features), square.new_zeros(()), square.new_zeros(())
        count = 0
        for ours, theirs in pairs:
            ours = self._resampled(ours.to(device)).flatten(0, 1).double()
            theirs = theirs.to(device).flatten(0, 1).double()
            ours = nn.functional.pad(ours, (0, 1), value=1.0)
            square, cross = square + ours.t() @ ours, cross + ours.t() @ theirs
            power, mean, count = power + theirs.square().sum(), mean + theirs.sum(0), count + len(theirs)
        ridge = torch.full_like(square.diagonal(), RIDGE * float(square.diagonal()[:-1].mean()))
        ridge[-1] = 0  # do not regularise the bias
        solution = torch.linalg.solve(square + ridge.diag(), cross)
        self.width.weight.copy_(solution[:-1].t())
        self.width.bias.copy_(solution[-1])
        residual = power - 2 * (solution * cross).sum() + (solution * (square @ solution)).sum()
        variance = power - mean.square().sum() / count
        return float(1 - residual / variance.clamp(min=1e-12))


def resampling(ours: Layout, theirs: Layout) -> Tensor:
    """Weights [teacher tokens, student tokens] with rows that sum to 1: each teacher token as a mean of student tokens.

    A teacher patch uses the student's patches at the same position (linear interpolation to a finer grid, areas to a
    coarser one). Two neighbours replace a student patch that `patch` dropped. A special token uses the student's
    special token with the same index, or the mean of the patches if there is none. In a mixture of features, each
    encoder uses the student's corresponding encoder.
    """
    axis = _along_an_axis(ours.side, theirs.side)
    patches = torch.kron(axis, axis)  # [their patches, our patches]
    if ours.first_patch:
        missing = patches[:, : ours.first_patch].sum(1, keepdim=True)
        patches = patches[:, ours.first_patch :].clone()
        near = torch.tensor([0, ours.side - ours.first_patch]) if ours.side > 1 else torch.tensor([0])
        patches[:, near] += missing / len(near)
    patches = patches[theirs.first_patch :]
    one = torch.zeros(theirs.specials + len(patches), ours.specials + patches.shape[1])
    one[theirs.specials :, ours.specials :] = patches
    for number in range(theirs.specials):
        if number < ours.specials:
            one[number, number] = 1.0
        else:
            one[number, ours.specials :] = 1.0 / patches.shape[1]
    weights = torch.zeros(len(one), theirs.streams, one.shape[1], ours.streams)
    for stream in range(theirs.streams):
        weights[:, stream, :, min(stream, ours.streams - 1)] = one
    return weights.reshape(len(one) * theirs.streams, one.shape[1] * ours.streams)


def _along_an_axis(ours: int, theirs: int) -> Tensor:
    """Weights [theirs, ours] that resample a row of cells."""
    edges, wanted = torch.arange(ours + 1) / ours, torch.arange(theirs + 1) / theirs
    if theirs <= ours:
        low = torch.maximum(edges[:-1][None], wanted[:-1][:, None])
        high = torch.minimum(edges[1:][None], wanted[1:][:, None])
        overlap = (high - low).clamp(min=0)
        return overlap / overlap.sum(1, keepdim=True)
    place = ((torch.arange(theirs) + 0.5) / theirs * ours - 0.5).clamp(0, ours - 1)
    left = place.floor().long().clamp(max=ours - 2) if ours > 1 else torch.zeros(theirs, dtype=torch.long)
    share = (place - left).clamp(0, 1)
    weights = torch.zeros(theirs, ours)
    rows = torch.arange(theirs)
    weights[rows, left] += 1 - share
    weights[rows, (left + 1).clamp(max=ours - 1)] += share
    return weights
