"""Detects the first NaN or infinity in a loss, a term or a gradient norm.

A loss or term that is not finite is multiplied into the loss, so it reaches every gradient and, through the reduction
of gradients, every rank. One number, the gradient's norm, then tells every rank whether the step is good. It is read
once per optimiser step. On a GPU it is read one step late, when it has long been computed, so that the host never waits
for the current step. Before anything is logged or written, every unread norm is read.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import gather_object, reduce
from torch import Tensor

from tinyllava_switchkd.io import JsonObject
from tinyllava_switchkd.runtime import is_main_process, rank

logger = logging.getLogger(__name__)

EVENTS = "non_finite.jsonl"
"""File in the output folder: one JSON object per event, with the step, the terms and the samples of every rank."""

SHOWN = 20
"""Number of samples named on the screen if `EVENTS` cannot be written."""

NON_FINITE = 3
"""Exit code of a run that stopped because something was not finite."""

SCALER_PATIENCE = 100
"""Consecutive steps that a float16 loss scaler may skip while it searches for its scale."""


class NonFiniteError(ArithmeticError):
    """A loss, a term, a gradient or a weight is not finite."""


@dataclass
class _Step:
    """What a step leaves to be checked: tensors on the device, and the names of its samples."""

    number: int
    names: list[list[str]] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    ids: list[Sequence[str]] = field(default_factory=list)
    norm: Tensor | float | None = None
    asked: Tensor | float = 0.0
    left_out: bool = False


class Guard:
    """Checks the steps of one run on this rank; every rank calls the same methods at the same steps.

    Args:
        output_dir: where `EVENTS` is written.
        skip: skip a bad step instead of stopping.
        most: consecutive bad steps after which the run stops even with `skip`.
        scaler: whether a float16 loss scaler skips steps whose gradients overflow, which is not an error.
    """

    def __init__(self, output_dir: str | Path, *, skip: bool = False, most: int = 10, scaler: bool = False) -> None:
        self.output_dir = Path(output_dir)
        self.skip, self.most, self.scaler = skip, most, scaler
        self.skipped = 0
        self.asked_to_stop = False
        self._in_a_row = 0
        self._scaled_in_a_row = 0
        self._open = _Step(0)
        self._closed: list[_Step] = []

    def begin(self, step: int, ids: Sequence[Sequence[str]], asked: Tensor | float) -> None:
        """Begin a step.

        Args:
            step: its number, counted from 1.
            ids: names of the samples of each micro-batch.
            asked: not 0 if some rank was asked to stop; the same on all ranks.
        """
        self._open = _Step(step, ids=list(ids), asked=asked)

    def watch(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Record the losses of a micro-batch, and make the loss NaN if any of them is not finite.

        Returns:
            the losses; with `skip`, all but "loss" are 0 in a bad micro-batch, so that means over steps stay finite.
        """
        names = [
            name
            for name, value in losses.items()
            if torch.is_tensor(value) and value.is_floating_point() and value.numel() == 1
        ]
        values = torch.stack([losses[name].detach().reshape(()).float() for name in names])
        self._open.names.append(names)
        self._open.values.append(values)
        good = values.isfinite().all()
        loss = losses["loss"] * torch.where(good, 1.0, math.nan).to(losses["loss"].dtype)
        if not self.skip:
            return {**losses, "loss": loss}
        finite = {name: torch.where(good, losses[name], torch.zeros_like(losses[name])) for name in names}
        return {**losses, **finite, "loss": loss}

    def end(self, norm: Tensor | float | None, left_out: bool = False) -> None:
        """End the step; its gradients are complete.

        Args:
            norm: their norm, the same on all ranks.
            left_out: whether the optimiser itself skipped the step (DeepSpeed, on overflow).
        """
        self._open.norm, self._open.left_out = norm, left_out
        self._closed.append(self._open)

    def judge(self, all_but_last: bool = False) -> bool:
        """Check the steps that have ended since the last call; returns whether all are good.

        Args:
            all_but_last: leave the last step for the next call, because the device is still computing it.

        Raises:
            NonFiniteError: a step is bad and the run must stop.
        """
        count = len(self._closed) - int(all_but_last)
        steps, self._closed = self._closed[:count], self._closed[count:]
        return all([self._judge(step) for step in steps])

    def _judge(self, step: _Step) -> bool:
        norm, asked = step.norm, step.asked
        if torch.is_tensor(norm) and torch.is_tensor(asked):  # one transfer from the device for both
            norm, asked = torch.stack([norm.detach().float().reshape(()), asked.to(norm.device).float()]).tolist()
        norm = 0.0 if norm is None else float(norm)
        self.asked_to_stop |= float(asked) > 0
        if math.isfinite(norm) and norm >= 0 and not step.left_out:  # DeepSpeed gives -1 for a norm that is not finite
            self._in_a_row = self._scaled_in_a_row = 0
            return True
        found = gather_object([self._samples(step)])
        terms = sorted({name for rank in found for name in rank["terms"]})
        if self.scaler and not terms and self._scaled_in_a_row < SCALER_PATIENCE:
            self._scaled_in_a_row += 1
            return True
        self.skipped += 1
        self._in_a_row += 1
        stops = not self.skip or self._in_a_row >= self.most
        what = ", ".join(terms) or "the gradient's norm"
        event = {"step": step.number, "action": "stop" if stops else "skip", "what": what, "samples": found}
        samples = f"its samples are {self._write(event)}"
        if stops:
            again = f", the last of {self._in_a_row} in a row" if self._in_a_row > 1 else ""
            raise NonFiniteError(
                f"Not finite at step {step.number}{again}: {what}. The run stops, and nothing was written after "
                f"that step; {samples}."
            )
        if is_main_process():
            logger.warning(
                "Not finite at step %d: %s. The step is skipped (%d so far); %s.",
                *(step.number, what, self.skipped, samples),
            )
        return False

    def _samples(self, step: _Step) -> JsonObject:
        """This rank's micro-batches with values that are not finite; all of them if only the norm is not finite."""
        bad = []
        for index, (names, values) in enumerate(zip(step.names, step.values, strict=True)):
            terms = {n: v for n, v in zip(names, values.tolist(), strict=True) if not math.isfinite(v)}
            bad.append((index, terms))
        chosen = [index for index, terms in bad if terms] or [index for index, _ in bad]
        return {
            "rank": rank(),
            "ids": [name for index in chosen if index < len(step.ids) for name in step.ids[index]],
            "terms": {name: str(value) for _, terms in bad for name, value in terms.items()},
        }

    def _write(self, event: JsonObject) -> str:
        """Append an event to `EVENTS`. Returns where the samples are named, or their names if it cannot be written."""
        path = self.output_dir / EVENTS
        if is_main_process():
            try:
                self.output_dir.mkdir(parents=True, exist_ok=True)
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(event, ensure_ascii=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                ids = [name for rank in event["samples"] for name in rank["ids"]]
                return f"{', '.join(ids[:SHOWN])}{', ...' if ids[SHOWN:] else ''} ({path}: {error.strerror})"
        return f"named in {path}"


def check_trained(model: torch.nn.Module) -> None:
    """Check on all ranks that the trained weights (under ZeRO-3 each rank's shard) are finite.

    Raises:
        NonFiniteError: some rank's are not.
    """
    parts = {
        name: getattr(parameter, "ds_tensor", parameter).detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    sums = [part.sum(dtype=torch.float32) for part in parts.values() if part.is_floating_point() and part.numel()]
    if not sums:
        return
    bad = (~torch.stack([total.to(sums[0].device) for total in sums]).isfinite()).any().float()
    if reduce(bad, "sum"):
        # a sum may overflow although every weight is finite
        names = [name for name, part in parts.items() if not part.isfinite().all()]
        everyone = sorted({name for rank in gather_object([names]) for name in rank})
        if everyone:
            raise NonFiniteError(f"The trained weights are not finite: {everyone[0]} ({len(everyone)} tensors in all).")
