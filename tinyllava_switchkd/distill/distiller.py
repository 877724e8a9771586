"""A student and its frozen teacher under a distillation method: from a batch to losses.

    teacher         L^T(P^T(V^T(image)), text)        no gradient
    student         L^S(P^S(V^S(image)), text)        all of the student
    visual switch   L^T(P^T(V^S(image)), text)        through the frozen L^T and P^T into V^S only

V: vision tower, P: connector, L: language model (Switch-KD Section 3.2, Figure 2). Each pathway that a method needs
runs once; what its terms want to see of it is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tinyllava_switchkd.model.splice import Spliced

from .bridge import Bridge, differ
from .methods.base import DenseTerm, Method, Views
from .objective import CE, RANKING, LogitTerm, TokenObjective, Tokens
from .task import Measure, Task
from .teacher import FrozenTeacher, Held
from .teacher_cache import TeacherCache, check_method, split
from .trace import (
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

if TYPE_CHECKING:
    from tinyllava_switchkd.data.collator import Batch
    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

KNEES = {"knee_teacher": "teacher leads", "knee_student": "student leads"}
"""How many logits count when each side leads, of a loss that ranks them."""

RANKING_MEASURES = {
    **{name: Measure(f"knee, {title}", of_batch=True) for name, title in KNEES.items()},
    "topk_overlap": Measure("overlap of the leading logits", of_batch=True),
}
"""What `RANKING` names."""


class PathwayLogits(NamedTuple):
    """Logits of the supervised tokens, row by row of the batch, over the shared vocabulary: [tokens, vocab] each."""

    teacher: Tensor
    student: Tensor
    visual_switch: Tensor


class Distiller(Task):
    """A student learns from a frozen teacher by a method.

    `student`, and the method's `adapters` if it has any, are the only registered sub-modules. The teacher follows
    `.to()` but is in neither `parameters()` nor `state_dict()`: no optimiser, checkpoint or ZeRO stage ever sees it. A
    quantised teacher does not follow: it stays on the device and in the precision that it was loaded with. The
    method's settings can be read as attributes. Build one with `build_distiller`.

    Args:
        student: the model to train.
        teacher: the model to learn from; frozen here.
        method: what is learned from it.
        vocab_size: number of leading token ids that both vocabularies share.
        adapters: modules that train beside the student and are no part of it.
        chunk_size: see `Task`.
        packing: see `Task`; all pathways are packed alike.
        pixel_difference: how the models prepare the same picture differently, in words; a batch must then hold
            `teacher_images` beside `images`. None if one preparation serves both.
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
        for loss in {term.loss: term.name for term in self.terms if isinstance(term, LogitTerm)}:
            if any(True for _ in loss.parameters()):
                trained.setdefault("loss", loss)
            else:
                # Not registered: ZeRO-3 expects every rank to call every module as often, but a rank without images
                # calls a loss less often, and would wait for the others forever.
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
        """Where the teacher's hidden states are kept; a batch whose samples are all there spares its own pass.

        Batches must then carry `digests` (see `DataCollatorForSupervisedDataset`).
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
        """Activation checkpointing in the student, and in the teacher's language model for the switch pass."""
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
            batch: `input_ids` [samples, tokens] with -200 where an image goes, `labels` alike with -100 where nothing
                is supervised, `attention_mask` alike (optional), `images` [images, 3, height, width], and
                `teacher_images` alike where the teacher wants them prepared in another way.
            num_items_in_batch: supervised tokens of the whole optimiser step (all micro-batches, all ranks), by which
                sums over this batch's supervised tokens are divided; None divides by this batch's own.
            step_counts: `counts` of the whole optimiser step, for terms that are means over something else; None
                divides by this batch's own.

        Returns:
            "loss" = ce + the weighted terms, with gradient; without: "ce", each term unweighted,
            "supervised_tokens", and for a term whose loss ranks logits means over the batch's tokens of "knee_teacher",
            "knee_student" (the k of each leader) and "topk_overlap" (share of the teacher's k tokens that are among
            the student's).
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
                value = term.compute(views) / counts[term.per]
                result["loss"] = result["loss"] + term.weight * value
                result[term.name] = value.detach().float()
        result["supervised_tokens"] = torch.tensor(tokens, device=result["loss"].device)
        return result

    @torch.no_grad()
    def pathway_logits(self, batch: Batch) -> PathwayLogits:
        """Dense logits of the three pathways, for inspection and tests; the teacher's where a sample has no image."""
        student, teacher, switch, positions = self._views(batch, always_switch=True)
        z_student = self.student.language_model.get_output_embeddings()(student.hidden)
        z_teacher = self.guide.head(teacher.hidden)
        z_switch = z_teacher
        if switch is not None:
            z_switch = torch.cat([self.guide.head(switch), z_teacher[positions.images :]])
        in_batch_order = positions.order.argsort()
        return PathwayLogits(*(z[in_batch_order, : self.vocab_size] for z in (z_teacher, z_student, z_switch)))

    def gradients(self, batch: Batch) -> dict[str, dict[str, Tensor | None]]:
        """Where and how each weighted term pulls, at three places of the student, for one batch.

        Costs a backward pass of the student a term. No parameter's gradient is touched.

        Returns:
            place ("vision_features", "projector_output", "last_hidden_state") -> term -> gradient of the weighted
            term's mean there, in the shape of what is there; None where a term does not reach.
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
        """How strongly each weighted term pulls: the norms of `gradients`, 0 where a term does not reach."""
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
                with torch.autocast(student.hidden.device.type, enabled=False):
                    value = term.compute(self._seen_by_terms(student, teacher)) / counts[term.per]
                yield term.name, term.weight * value
            else:
                tokens = supervised._replace(labels=None)
                if term.tokens == "visual":
                    tokens = Tokens(student.visual, None, teacher.visual)
                yield term.name, self._objective((term,))(tokens)[0] / counts[term.per]

    # From a batch to views

    def _views(
        self, batch: Batch, always_switch: bool = False, seen: dict[str, Tensor] | None = None
    ) -> tuple[View, View, Tensor | None, Positions]:
        """What student and teacher show, the switch's hidden states of samples with images, the student's positions."""
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
            elif self.bridge is not None:  # every rank trains the bridge, also on text alone
                student.hidden = student.hidden + bridged.sum().to(student.hidden.dtype) * 0
        return student, teacher, switch, positions

    def _teacher_view(self, batch: Batch, features: Tensor, student: Spliced, positions: Positions) -> View:
        """What the teacher shows, from its cache if all of it is there.

        One sample that is not has the whole batch run: it gives what it would give without a cache, to the last bit.
        No rank waits for another here, for the teacher is whole on each.
        """
        if self._cache is None:
            return self._run_teacher(batch, features, student, positions)
        if "digests" not in batch:
            raise ValueError(
                "The teacher cache knows samples by 'digests', which this batch lacks; set the collator's."
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
        """What the teacher's hidden states come in."""
        return next(p.dtype for p in self.guide.head.parameters() if p.is_floating_point())

    @torch.no_grad()
    def _run_teacher(self, batch: Batch, features: Tensor, student: Spliced, positions: Positions) -> View:
        teacher, sight, visual = self.teacher, self.method.teacher_sight, None
        if not len(positions.labels) and sight == BLIND:
            return View(next(teacher.parameters()).new_zeros(0, teacher.config.hidden_size))
        images = placeholders(batch).any()
        if images:
            if not (self._one_encoder and _is_frozen(self.student.vision_tower)):
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
        """The batch's images as the teacher takes them."""
        if batch.get("teacher_images") is not None:
            return batch_images(batch, self.teacher, "teacher_images")
        if self.pixel_difference is not None:
            raise ValueError(
                f"Student and teacher prepare pictures differently ({self.pixel_difference}), and the batch holds no "
                f"'teacher_images'; give the pictures as the teacher prepares them, too."
            )
        return batch_images(batch, self.teacher)

    def _switch_states(self, batch: Batch, features: Tensor, positions: Positions) -> Tensor:
        """Hidden states of the teacher that sees through the student's vision tower; text-only samples are left out."""
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
        """What stands between the student's vision tower and the teacher's connector, if anything."""
        return getattr(self._adapters, "bridge", None)

    @torch.no_grad()
    def fit_bridge(self, batches: Iterable[Batch]) -> float:
        """Begin the bridge as the least-squares map from the student's vision features to the teacher's.

        Args:
            batches: some of the training data; those without images are passed over.

        Returns:
            the share of the teacher features' variance that the map explains.

        Raises:
            ValueError: there is no bridge, or no image.
        """
        if self.bridge is None:
            raise ValueError("This distiller has no bridge: the two vision towers give features of one shape.")
        seen = [batch for batch in batches if placeholders(batch).any()]
        if not seen:
            raise ValueError(
                "No batch has an image, so the bridge between the vision towers has nothing to begin from."
            )
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
