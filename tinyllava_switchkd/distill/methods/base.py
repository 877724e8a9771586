"""The base class of distillation methods: settings, the tensors they need, and their terms."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn

from tinyllava_switchkd.distill.losses import LossFactory
from tinyllava_switchkd.distill.objective import CE, LogitTerm
from tinyllava_switchkd.distill.trace import Sight, View
from tinyllava_switchkd.registry import Registry

if TYPE_CHECKING:
    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

MethodFactory: Registry[type[Method]] = Registry("distillation method")
"""``MethodFactory("switch_kd")`` is the class of a method."""


def register_method(*names: str, override: bool = False) -> Callable[[type[Method]], type[Method]]:
    """``@register_method("name")`` on a dataclass derived from `Method`; the first name becomes its `name`."""

    def decorator(cls: type[Method]) -> type[Method]:
        cls.name = names[0]
        return MethodFactory.register(*names, override=override)(cls)

    return decorator


def setting(default: object, help: str, flag: str | None = None) -> Any:
    """A field of a method.

    Args:
        default: default value.
        help: one sentence for the command line and the documentation.
        flag: its name on the command line, if not the field's.
    """
    return field(default=default, metadata={"help": help, "flag": flag})


class Views(NamedTuple):
    """Input of a dense term.

    Attributes:
        student: the student's pathway.
        teacher: the teacher's, without gradients.
        adapters: the method's own trained modules.
        student_head: student hidden states -> logits.
        teacher_head: likewise for the teacher.
        vocab_size: number of token ids that both vocabularies share.
        kept: storage for tensors that depend on the frozen teacher only.
    """

    student: View
    teacher: View
    adapters: nn.ModuleDict
    student_head: nn.Linear
    teacher_head: nn.Linear
    vocab_size: int
    kept: dict[str, Tensor]


class DenseTerm(NamedTuple):
    """A weighted term that is not a loss between logits.

    Attributes:
        name: name under which it is reported, unweighted.
        compute: returns the sum over the batch's units (without any, a zero that is part of the graph).
        weight: factor of its mean in the training loss.
        per: unit of the mean: "samples" (samples with images), "images", "visual" (visual tokens) or "supervised"
            (tokens). The sum is divided by their number in the whole optimiser step.
        title: for curves and documentation; the name if empty.
    """

    name: str
    compute: Callable[[Views], Tensor]
    weight: float = 1.0
    per: str = "samples"
    title: str = ""

    @property
    def reports(self) -> tuple[str, ...]:
        """Names of the numbers that the term reports."""
        return (self.name,)


Term = LogitTerm | DenseTerm


@dataclass
class Method:
    """Base class of distillation methods. A subclass is a dataclass whose fields are its settings.

    The objective is cross-entropy plus the weighted `terms`. Fields whose names end in ``_weight`` must be finite and
    at least 0. A method omits terms of weight 0 that nothing else needs.
    """

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name.endswith("_weight") and not (_is_number(value) and 0 <= value < math.inf):
                raise ValueError(f"{one.name} must be a number of at least 0, not {value}.")

    @property
    def switch(self) -> bool:
        """Whether the student's vision features also go through the teacher's connector and language model."""
        return any(term.pathway == "switch" for term in self.terms if isinstance(term, LogitTerm))

    @property
    def student_sight(self) -> Sight:
        """The tensors to keep of the student's pathway."""
        return Sight()

    @property
    def teacher_sight(self) -> Sight:
        """The tensors to keep of the teacher's pathway."""
        return self.student_sight

    @property
    def terms(self) -> Sequence[Term]:
        """The weighted terms besides cross-entropy."""
        raise NotImplementedError(f"{type(self).__name__} must define terms.")

    def check(self, student: TinyLlava, teacher: TinyLlava) -> None:
        """Refuse a pair of models that the method cannot compare; models may be on the meta device.

        Raises:
            ValueError: one sentence with both sides' values.
        """

    def adapters(self, student: TinyLlava, teacher: TinyLlava) -> Mapping[str, nn.Module]:
        """Modules that are trained with the student but are not part of it; none by default."""
        return {}

    @classmethod
    def settings(cls) -> dict[str, dataclasses.Field]:
        """Flag -> field."""
        return {
            one.metadata.get("flag") or one.name: one for one in fields(cls) if one.init and one.name != "loss_settings"
        }

    @classmethod
    def create(cls, **settings: object) -> Method:
        """Create a method from settings by field name; other settings are passed to its loss.

        Raises:
            ValueError: neither the method nor its loss has a setting, or a value is wrong.
        """
        own = {one.name for one in fields(cls)}
        of_loss = {name: value for name, value in settings.items() if name not in own and value is not None}
        if of_loss and "loss_settings" not in own:
            raise ValueError(
                f"The distillation method {cls.name!r} does not take {', '.join(sorted(of_loss))}; it has "
                f"{', '.join(one.name for one in fields(cls)) or 'no settings'}."
            )
        settings = {name: value for name, value in settings.items() if name in own}
        return cls(**settings, **({"loss_settings": of_loss} if of_loss else {}))


def same_visual_tokens(method: str, student: TinyLlava, teacher: TinyLlava, remedy: str) -> None:
    """Refuse a pair of models with different numbers of visual tokens.

    Raises:
        ValueError: names both numbers.
    """
    ours, theirs = student.num_image_tokens, teacher.num_image_tokens
    if ours != theirs:
        raise ValueError(
            f"{method} compares visual tokens one by one, but the student makes {ours} per image and the teacher "
            f"{theirs}; choose towers and connectors with equal numbers, leave out these terms ({remedy}), or use "
            f"--distill_method switch_kd."
        )


def terms_of_all_methods() -> dict[str, str]:
    """Name -> title of all terms of the registered methods, cross-entropy first."""
    found = {CE: "cross-entropy"}
    for name in MethodFactory.list():
        found |= {term.name: term.title or term.name for term in MethodFactory(name)().terms}
    return found


def make_loss(name: str, temperature: float, settings: Mapping[str, object]) -> nn.Module:
    """Create a registered loss.

    Raises:
        ValueError: there is no such loss, or it does not have one of the settings.
    """
    try:
        return LossFactory(name)(temperature=temperature, **settings)
    except TypeError as error:
        known = [one for one in inspect.signature(LossFactory(name).__init__).parameters if one != "self"]
        raise ValueError(
            f"The distillation loss {name!r} does not take these settings: {error}; it has {', '.join(known)}."
        ) from error


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
