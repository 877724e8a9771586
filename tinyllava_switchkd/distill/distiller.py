"""The distiller computes a method's losses for a batch, from a student and its frozen teacher.

    teacher         L^T(P^T(V^T(image)), text)        no gradient
    student         L^S(P^S(V^S(image)), text)        all of the student
    visual switch   L^T(P^T(V^S(image)), text)        through the frozen L^T and P^T into V^S only

V: vision tower, P: connector, L: language model (Switch-KD Section 3.2, Figure 2). Each pathway that a method needs
runs once and keeps only what the method's terms use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tinyllava_switchkd.distill.bridge import Bridge, differ
from tinyllava_switchkd.distill.methods.base import DenseTerm, Method, Views
from tinyllava_switchkd.distill.objective import CE, RANKING, LogitTerm, TokenObjective, Tokens
from tinyllava_switchkd.distill.task import Measure, Task
from tinyllava_switchkd.distill.teacher import FrozenTeacher, Held
from tinyllava_switchkd.distill.teacher_cache import TeacherCache, check_method, split
from tinyllava_switchkd.distill.trace import (
    BLIND,
    TEXT_KEYS,
    Positions,
    View,
    batch_images,
    decode,
    look,
    placeholders,
    splice_batch,
    supervised_positions,
)
from tinyllava_switchkd.model.splice import Spliced

if TYPE_CHECKING:
    from tinyllava_switchkd.data.collator import Batch
    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

KNEES = {"knee_teacher": "teacher leads", "knee_student": "student leads"}
"""Name -> title of the number of logits that count when each side leads, for losses that rank logits."""

RANKING_MEASURES = {
    **{name: Measure(f"knee, {title}", of_batch=True) for name, title in KNEES.items()},
    "topk_overlap": Measure("overlap of the leading logits", of_batch=True),
}
"""The measures named in `RANKING`."""


class PathwayLogits(NamedTuple):
    """Logits of the supervised tokens in the order of the batch, over the shared vocabulary: [tokens, vocab] each."""

    teacher: Tensor
    student: Tensor
    visual_switch: Tensor


class Distiller(Task):
    """Trains a student with a frozen teacher and a distillation method. Build one with `build_distiller`.

    Only `student` and the method's `adapters`, if any, are registered sub-modules. The teacher follows `.to()` but is
    in neither `parameters()` nor `state_dict()`, so no optimiser, checkpoint or ZeRO stage ever sees it. A quantised
    teacher keeps the device and precision that it was loaded with. The method's settings can be read as attributes.

    Args:
        student: the model to train.
        teacher: the model to learn from; frozen here.
        method: the distillation method.
        vocab_size: number of leading token ids that both vocabularies share.
        adapters: modules that are trained with the student but are not part of it.
        chunk_size: see `Task`.
        packing: see `Task`; applies to all pathways.
        pixel_difference: how the models' image preprocessing differs, in words; a batch must then have
            `teacher_images` besides `images`. None if it is the same.
    """

    def __init__(
        self,
        student: TinyLlava,
        teacher: TinyLlava,
        method: Method,
        *,
        vocab_size: int,
        adapters: Mapping[str, nn.Module] | None = None,
        chunk_size: int | None = None,
        packing: bool = False,
        pixel_difference: str | None = None,
    ) -> None:
        super().__init__(student, chunk_size, packing)
        self.method = method
        self.pixel_difference = pixel_difference
        self.terms = tuple(method.terms)
        self.vocab_size = vocab_size
        trained = dict(adapters or {})
        self.guide = FrozenTeacher(teacher)
        self._held: list[Held] = [self.guide]
        for loss, name in {term.loss: term.name for term in self.terms if isinstance(term, LogitTerm)}.items():
            if any(True for _ in loss.parameters()):
                trained["loss" if "loss" not in trained else f"loss_{name}"] = loss
            else:
                # Not registered, because ZeRO-3 expects all ranks to call a module equally often. A rank without images
                # calls the loss less often, and ranks would wait for each other forever.
                self._held.append(Held(loss))
        if trained:
            self.adapters = nn.ModuleDict(trained)
        self._kept: dict[str, Tensor] = {}
        self._cache: TeacherCache | None = None
        self._one_encoder = _is_frozen(student.vision_tower) and self.guide.sees_as(student)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            method = self.__dict__.get("method")
            if method is None or name not in (one.name for one in fields(method)):
                raise
            return getattr(method, name)

    @property
    def teacher(self) -> TinyLlava:
        return self.guide.module

    @property
    def teacher_cache(self) -> TeacherCache | None:
        """Cache of the teacher's hidden states; a batch whose samples are all cached needs no teacher pass.

        Batches must then have `digests` (see `DataCollatorForSupervisedDataset`).
        """
        return self._cache

    @teacher_cache.setter
    def teacher_cache(self, cache: TeacherCache | None) -> None:
        if cache is not None:
            check_method(self.method)
        self._cache = cache

    @property
    def loss(self) -> nn.Module | None:
        """The loss of the first logit term."""
        return next((term.loss for term in self.terms if isinstance(term, LogitTerm)), None)

    @property
    def models(self) -> tuple[TinyLlava, ...]:
        return (self.student, self.teacher)

    @property
    def measures(self) -> dict[str, Measure]:
        found = super().measures
        for term in self.terms:
            found[term.name] = Measure(term.title or term.name, weight=term.weight, per=term.per)
            found |= {name: RANKING_MEASURES[name] for name in term.reports[1:]}
        return found

    @property
    def units(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("supervised", *(term.per for term in self.terms))))

    def _apply(self, fn, *args, **kwargs):
        for held in self._held:
            held.follow(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def gradient_checkpointing_enable(self, **kwargs: object) -> None:
        """Checkpoint activations in the student, and in the teacher's language model for the switch pass."""
        super().gradient_checkpointing_enable(**kwargs)
        self.guide.checkpoint_activations(True, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        super().gradient_checkpointing_disable()
        self.guide.checkpoint_activations(False)

    def forward(
        self,
        batch: Batch,
        num_items_in_batch: Tensor | int | None = None,
        step_counts: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            batch: `input_ids` [samples, tokens] with -200 for each image, `labels` [samples, tokens] with -100 at
                unsupervised tokens, optionally `attention_mask` [samples, tokens], `images` [images, 3, height, width],
                and `teacher_images` of the same images if the teacher preprocesses them differently.
            num_items_in_batch: supervised tokens of the whole optimiser step (all micro-batches and ranks), by which
                sums over this batch's supervised tokens are divided; None divides by this batch's own.
            step_counts: `counts` of the whole optimiser step, for terms that are means over other units; None divides
                by this batch's own.

        Returns:
            "loss", which is ce plus the weighted terms, with gradient; without gradient "ce", each term unweighted and
            "supervised_tokens"; for a term whose loss ranks logits also the means over the batch's tokens of
            "knee_teacher", "knee_student" (the k of each leader) and "topk_overlap" (share of the teacher's k tokens
            that are among the student's).
        """
        student, teacher, switch, positions = self._views(batch)
        tokens = len(positions.labels)
        counts = self._divisors(batch, tokens, num_items_in_batch, step_counts)
        result: dict[str, Tensor] = {}
        self._add_logit_terms(
            result, "supervised", Tokens(student.hidden, positions.labels, teacher.hidden, switch), counts
        )
        if any(isinstance(term, LogitTerm) and term.tokens == "visual" for term in self.terms):
            self._add_logit_terms(result, "visual", Tokens(student.visual, None, teacher.visual), counts)
        views = self._seen_by_terms(student, teacher)
        for term in self.terms:
            if isinstance(term, DenseTerm):
                value = self._mean(term, views, counts)
                result["loss"] = result["loss"] + term.weight * value
                result[term.name] = value.detach().float()
        result["supervised_tokens"] = torch.tensor(tokens, device=result["loss"].device)
        return result

    @torch.no_grad()
    def pathway_logits(self, batch: Batch) -> PathwayLogits:
        """Dense logits of the three pathways, for inspection and tests; text-only samples have the teacher's for the
        switch."""
        student, teacher, switch, positions = self._views(batch, always_switch=True)
        z_student = self.student.language_model.get_output_embeddings()(student.hidden)
        z_teacher = self.guide.head(teacher.hidden)
        z_switch = z_teacher
        if switch is not None:
            z_switch = torch.cat([self.guide.head(switch), z_teacher[positions.images :]])
        in_batch_order = positions.order.argsort()
        return PathwayLogits(*(z[in_batch_order, : self.vocab_size] for z in (z_teacher, z_student, z_switch)))

    def gradients(self, batch: Batch) -> dict[str, dict[str, Tensor | None]]:
        """Gradients of each weighted term at three places in the student, for one batch.

        Costs one backward pass of the student per term. Gradients of parameters are not changed.

        Returns:
            place ("vision_features", "projector_output", "last_hidden_state") -> term -> gradient of the weighted
            term's mean with respect to the tensor there; None if the term does not depend on it.
        """
        with torch.enable_grad():
            seen: dict[str, Tensor] = {}
            student, teacher, switch, positions = self._views(batch, seen=seen)
            seen["last_hidden_state"] = student.hidden
            places = {name: tensor for name, tensor in seen.items() if tensor.requires_grad}
            counts = self._divisors(batch, len(positions.labels), None, None)
            gradients: dict[str, dict[str, Tensor | None]] = {name: {} for name in seen}
            for name, loss in self._single_terms(student, teacher, switch, positions, counts):
                found: tuple = (None,) * len(places)
                if loss.requires_grad and places:
                    found = torch.autograd.grad(loss, list(places.values()), retain_graph=True, allow_unused=True)
                of_term = dict(zip(places, found, strict=True))
                for place in seen:
                    gradients[place][name] = of_term.get(place)
        return gradients

    def gradient_norms(self, batch: Batch) -> dict[str, dict[str, float]]:
        """Norms of `gradients`, 0 for None."""
        return {
            place: {name: 0.0 if one is None else float(one.double().norm()) for name, one in terms.items()}
            for place, terms in self.gradients(batch).items()
        }

    def _single_terms(
        self,
        student: View,
        teacher: View,
        switch: Tensor | None,
        positions: Positions,
        counts: Mapping[str, Tensor | int],
    ) -> Iterator[tuple[str, Tensor]]:
        """Each weighted term's mean with its gradient, cross-entropy first."""
        supervised = Tokens(student.hidden, positions.labels, teacher.hidden, switch)
        yield CE, self._objective(())(supervised)[0] / counts["supervised"]
        for term in self.terms:
            if isinstance(term, DenseTerm):
                yield term.name, term.weight * self._mean(term, self._seen_by_terms(student, teacher), counts)
            else:
                tokens = supervised._replace(labels=None)
                if term.tokens == "visual":
                    tokens = Tokens(student.visual, None, teacher.visual)
                yield term.name, self._objective((term,))(tokens)[0] / counts[term.per]

    # From a batch to views

    def _views(
        self, batch: Batch, always_switch: bool = False, seen: dict[str, Tensor] | None = None
    ) -> tuple[View, View, Tensor | None, Positions]:
        """Views of student and teacher, the switch's hidden states of samples with images, the student's positions."""
        sight = self.method.student_sight
        features, visual, spliced, positions = self.student_inputs(batch)
        if seen is not None:
            seen |= {"vision_features": features, "projector_output": visual}
        student = look(self.student, spliced, positions, sight, packing=self.packing)
        shown = int(placeholders(batch).sum()) if sight.features or sight.projected else 0
        if sight.features:
            student.features = features[:shown]
        if sight.projected:
            student.projected = visual[:shown]
        teacher = self._teacher_view(batch, features, spliced, positions)
        switch = None
        if self.method.switch or (always_switch and (self.bridge or differ(self.student, self.teacher) is None)):
            bridged = features if self.bridge is None else self.bridge(features)
            if positions.images:
                switch = self._switch_states(batch, bridged, positions)
            elif self.bridge is not None:  # every rank trains the bridge, even without images
                student.hidden = student.hidden + bridged.sum().to(student.hidden.dtype) * 0
        return student, teacher, switch, positions

    def _teacher_view(self, batch: Batch, features: Tensor, student: Spliced, positions: Positions) -> View:
        """The teacher's view, from the cache if all samples are there.

        Otherwise the whole batch runs, so that the result is bit for bit that without a cache. Ranks need not agree,
        because each has the whole teacher.
        """
        if self._cache is None:
            return self._run_teacher(batch, features, student, positions)
        if "digests" not in batch:
            raise ValueError(
                "The teacher cache needs the batch's 'digests'; set the attribute digests of the collator to True."
            )
        samples, counts = torch.unique_consecutive(positions.rows, return_counts=True)
        found = [self._cache.get(batch["digests"][row]) for row in samples.tolist()]
        known = [hidden for hidden in found if hidden is not None]
        if known and [len(hidden) for hidden in known] == counts.tolist():
            like = self.guide.head.weight
            return View(torch.cat(known).to(like.device, self._teacher_dtype()))
        view = self._run_teacher(batch, features, student, positions)
        for digest, hidden in split(view.hidden, positions.rows, batch["digests"]).items():
            self._cache.add(digest, hidden)
        return view

    def _teacher_dtype(self) -> torch.dtype:
        """The dtype of the teacher's hidden states."""
        return next(p.dtype for p in self.guide.head.parameters() if p.is_floating_point())

    @torch.no_grad()
    def _run_teacher(self, batch: Batch, features: Tensor, student: Spliced, positions: Positions) -> View:
        teacher, sight, visual = self.teacher, self.method.teacher_sight, None
        if not len(positions.labels) and sight == BLIND:
            return View(next(teacher.parameters()).new_zeros(0, teacher.config.hidden_size))
        images = placeholders(batch).any()
        if images:
            same_pixels = batch.get("teacher_images") is None and self.pixel_difference is None
            if not (same_pixels and self._one_encoder and _is_frozen(self.student.vision_tower)):
                features = teacher.vision_features(self._teacher_images(batch))
            visual = self.guide.connect(features)
        spliced = splice_batch(teacher, batch, visual)
        if spliced.labels.shape != student.labels.shape or teacher.num_image_tokens != self.student.num_image_tokens:
            positions = supervised_positions(batch["input_ids"], spliced)  # another number of visual tokens
        view = look(teacher, spliced, positions, sight, packing=self.packing)
        if sight.features:
            view.features = features if images else features[:0]
        if sight.projected:
            none = features.new_zeros(0, teacher.num_image_tokens, teacher.config.hidden_size)
            view.projected = none if visual is None else visual
        return view

    def _teacher_images(self, batch: Batch) -> Tensor:
        """The batch's images, preprocessed for the teacher."""
        if batch.get("teacher_images") is not None:
            return batch_images(batch, self.teacher, "teacher_images")
        if self.pixel_difference is not None:
            raise ValueError(
                f"Student and teacher preprocess images differently ({self.pixel_difference}), but the batch has no "
                f"'teacher_images'; add the images as preprocessed for the teacher."
            )
        return batch_images(batch, self.teacher)

    def _switch_states(self, batch: Batch, features: Tensor, positions: Positions) -> Tensor:
        """Hidden states of the teacher with the student's vision features, without text-only samples."""
        with_image = placeholders(batch).any(1)
        part: Batch = {}
        for key in TEXT_KEYS:
            if batch.get(key) is not None:
                part[key] = batch[key][with_image]
        spliced = splice_batch(self.teacher, part, self.guide.connect(features))
        if self.teacher.num_image_tokens == self.student.num_image_tokens:
            row_of = with_image.cumsum(0) - 1  # row in the batch -> row among the samples with images
            rows, columns = row_of[positions.rows[: positions.images]], positions.columns[: positions.images]
        else:
            rows, columns, *_ = supervised_positions(part["input_ids"], spliced)
        with self.guide.checkpointing():
            return decode(self.teacher, spliced, self.packing).at(rows, columns)

    @property
    def _adapters(self) -> nn.ModuleDict:
        return getattr(self, "adapters", _NO_ADAPTERS)

    @property
    def bridge(self) -> Bridge | None:
        """The bridge between the student's vision tower and the teacher's connector, if there is one."""
        return getattr(self._adapters, "bridge", None)

    @torch.no_grad()
    def fit_bridge(self, batches: Iterable[Batch]) -> float:
        """Initialise the bridge with the least-squares map from the student's vision features to the teacher's.

        Args:
            batches: some of the training data; batches without images are skipped.

        Returns:
            the share of the variance of the teacher features that the map explains.

        Raises:
            ValueError: there is no bridge, or no image.
        """
        if self.bridge is None:
            raise ValueError("This distiller has no bridge: the features of both vision towers have the same shape.")
        seen = [batch for batch in batches if placeholders(batch).any()]
        if not seen:
            raise ValueError("No batch has an image, so the bridge between the vision towers cannot be initialised.")
        return self.bridge.fit(
            (
                self.student.vision_features(batch_images(batch, self.student)),
                self.teacher.vision_features(self._teacher_images(batch)),
            )
            for batch in seen
        )

    # From views to losses

    def _divisors(
        self,
        batch: Batch,
        tokens: int,
        num_items_in_batch: Tensor | int | None,
        step_counts: Mapping[str, Tensor] | None,
    ) -> dict[str, Tensor | int]:
        counts: dict[str, Tensor | int] = {"supervised": max(tokens, 1), "tokens": max(tokens, 1)}
        if len(self.units) > 1:
            counts |= {name: n.clamp(min=1) for name, n in (step_counts or self.counts(batch)).items()}
        counts["supervised"] = max(tokens, 1) if num_items_in_batch is None else num_items_in_batch
        return counts

    def _seen_by_terms(self, student: View, teacher: View) -> Views:
        head = self.student.language_model.get_output_embeddings()
        return Views(student, teacher, self._adapters, head, self.guide.head, self.vocab_size, self._kept)

    def _mean(self, term: DenseTerm, views: Views, counts: Mapping[str, Tensor | int]) -> Tensor:
        """A dense term's mean, in the precision that the term chooses."""
        with torch.autocast(views.student.hidden.device.type, enabled=False):
            return term.compute(views) / counts[term.per]

    def _objective(self, terms: Sequence[LogitTerm]) -> TokenObjective:
        return TokenObjective(
            self.student.language_model.get_output_embeddings(),
            self.guide.head,
            terms,
            vocab_size=self.vocab_size,
            chunk_size=self.chunk_size,
            recompute=self.recompute,
        )

    def _add_logit_terms(
        self, result: dict[str, Tensor], kind: str, tokens: Tokens, counts: Mapping[str, Tensor | int]
    ) -> None:
        objective = self._objective(
            [term for term in self.terms if isinstance(term, LogitTerm) and term.tokens == kind]
        )
        total, sums = objective(tokens)
        result["loss"] = result.get("loss", 0.0) + total / counts[kind]
        for name, value in zip(objective.names(tokens), sums, strict=True):
            result[name] = value / counts["tokens" if name in RANKING else kind]


_NO_ADAPTERS = nn.ModuleDict()


def _is_frozen(module: nn.Module) -> bool:
    return not any(p.requires_grad for p in module.parameters())
