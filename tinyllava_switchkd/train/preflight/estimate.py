"""Estimate of the memory that a run needs on each GPU, before anything is loaded.

Weights, gradients and optimiser state are counted from the configurations. Activations are counted by running the three
passes once on torch's meta device, where tensors have shapes but no storage, and adding up what autograd would keep.
Only configurations are downloaded, and nothing is allocated. The estimate leaves out DeepSpeed's communication buckets,
fragmentation in the allocator and the CUDA context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tinyllava_switchkd.distill import Task
from tinyllava_switchkd.distill.bridge import differ
from tinyllava_switchkd.distill.objective import CHUNK_ELEMENTS
from tinyllava_switchkd.model.quantized import linears_to_quantize, weight_bytes
from tinyllava_switchkd.train.command_line.arguments import Arguments, TeacherArguments, TrainingArguments
from tinyllava_switchkd.train.preflight.skeleton import checkpoint_skeleton, student_skeleton, visual_tokens
from tinyllava_switchkd.train.recipes import TrainingRecipeFactory

if TYPE_CHECKING:
    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

LOGIT_COPIES = (3, 4, 6)
"""Float32 copies of a chunk's logits at the peak (softmax, gradients, teacher's logits, buffers), with cross-entropy
only, with the align term, and with the switch term as well. Measured by benchmarks/step.py."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU."""

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    recomputed: int
    logits: int
    head_gradient: int

    @property
    def peak(self) -> int:
        """The peak: in the losses, in the first layer that the backward pass recomputes, or in the optimiser."""
        resident = self.weights + self.teacher + self.optimizer
        passes = self.activations + self.head_gradient + max(self.logits, self.recomputed)
        return resident + max(passes, self.gradients)

    def table(self) -> list[tuple[str, float]]:
        """Rows of (name, GiB); the peak is the last one."""
        rows = [(name.replace("_", " "), size / 2**30) for name, size in asdict(self).items()]
        return [*rows, ("peak", self.peak / 2**30)]


def estimate(
    student: TinyLlava,
    teacher: TinyLlava | None = None,
    *,
    batch_size: int,
    text_tokens: int,
    supervised_tokens: int | None = None,
    gpus: int = 1,
    zero_stage: int = 0,
    offload: bool = False,
    mixed_precision: bool = True,
    master_weights: bool = True,
    checkpointing: bool = False,
    switch: bool = True,
    chunk_size: int | None = None,
    half_teacher: bool | None = None,
    teacher_bits: int = 16,
) -> Estimate:
    """Memory of a training step.

    Args:
        student: a TinyLLaVA on the meta device, with `requires_grad` set as in training.
        teacher: a TinyLLaVA on the meta device, or None for training without distillation.
        batch_size: samples per GPU, with one image each.
        text_tokens: text tokens per sample.
        supervised_tokens: tokens per sample with a loss; None means half of the text.
        gpus: ranks that ZeRO shards over.
        zero_stage: 0 to 3.
        offload: optimiser state on the CPU.
        mixed_precision: weights, gradients and activations in bfloat16 or float16; otherwise in float32.
        master_weights: in mixed precision, float32 optimiser state and a float32 copy of the weights, as in DeepSpeed.
        checkpointing: activation checkpointing in the student and in the teacher's switch pass.
        switch: whether the switch pass runs.
        chunk_size: as in `build_distiller`.
        half_teacher: whether the teacher is in bfloat16 or float16; None means as the student. Under torch's autocast
            only the student's weights are in float32. All of its activations are then counted as float32, although
            autocast keeps only some of them so.
        teacher_bits: 8 or 4 if the teacher's language model is quantised.
    """
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in student.parameters()) - trained
    size = 2 if mixed_precision else 4
    teacher_size = size if half_teacher is None else 2 if half_teacher else 4

    def shard(stage: int, total: int) -> int:
        return total // gpus if zero_stage >= stage else total

    states = 12 if mixed_precision and master_weights else 2 * size
    optimizer = 0 if offload else shard(1, trained * states)
    length = text_tokens + student.num_image_tokens
    with _fused_attention(student, teacher):
        passes = [(student, lambda recompute: _student_bytes(student, batch_size, length, recompute, size))]
        if teacher is not None and switch:
            inputs = (student, teacher, batch_size, length)
            passes.append((teacher, lambda recompute: _switch_bytes(*inputs, recompute, teacher_size, teacher_bits)))
        activations = sum(run(checkpointing) for _, run in passes)
        layers = [model.config.text_config.num_hidden_layers for model, _ in passes]
        again = [run(False) // count for (_, run), count in zip(passes, layers, strict=True)] if checkpointing else [0]
    supervised = batch_size * (text_tokens // 2 if supervised_tokens is None else supervised_tokens)
    head = student.get_output_embeddings().weight
    chunk = min(chunk_size or max(64, CHUNK_ELEMENTS // head.shape[0]), supervised)
    terms = 0 if teacher is None else 1 + switch
    # The head's gradient is kept until the backward pass; it is float32 if summed over chunks.
    head_gradient = head.numel() * (4 if chunk < supervised else size) if head.requires_grad else 0
    return Estimate(
        weights=shard(3, trained * size) + shard(3, frozen * size),
        gradients=shard(2, trained * size),
        optimizer=optimizer,
        teacher=0 if teacher is None else weight_bytes(teacher, teacher_size, teacher_bits),
        activations=activations,
        recomputed=max(again),
        logits=LOGIT_COPIES[terms] * chunk * head.shape[0] * 4,
        head_gradient=head_gradient,
    )


def estimate_run(arguments: Arguments) -> str:
    """A table of the memory that a command line needs on each device, with a remedy if it does not fit.

    Assumes sequences of the maximum length (``--model_max_length``) with half of their text supervised.
    """
    model, _, training, distill, _ = arguments
    recipe = TrainingRecipeFactory(training.training_recipe)(training)
    student = recipe(student_skeleton(arguments)).train()
    teacher = None
    if distill.teacher_path is not None:
        teacher = checkpoint_skeleton(distill.teacher_path, model.cache_dir).requires_grad_(False)
    deepspeed = getattr(training, "hf_deepspeed_config", None)
    result = estimate(
        student,
        teacher,
        batch_size=training.per_device_train_batch_size,
        text_tokens=max(student.config.tokenizer_model_max_length - student.num_image_tokens, 2),
        gpus=training.world_size,
        zero_stage=0 if deepspeed is None else deepspeed.get_value("zero_optimization.stage", 0),
        offload=deepspeed is not None and deepspeed.is_offload(),
        mixed_precision=recipe.weights_dtype() != torch.float32,
        master_weights=deepspeed is not None,
        checkpointing=training.gradient_checkpointing,
        switch=teacher is not None and distill.method().switch,
        chunk_size=distill.chunk_size,
        half_teacher=recipe.compute_dtype() != torch.float32,
        teacher_bits=distill.teacher_bits,
    )
    lines = [f"{name:12s} {size:8.2f} GiB" for name, size in result.table()]
    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties(training.device).total_memory
        lines.append(f"{'device':12s} {there / 2**30:8.2f} GiB")
        if result.peak > there:
            lines.append(f"It will not fit: {_remedy(result, training, distill)}.")
    return "\n".join([f"An image takes {visual_tokens(student)}.", *lines])


def _remedy(result: Estimate, training: TrainingArguments, distill: TeacherArguments) -> str:
    """The flag that reduces the largest item most."""
    smaller_batch = f"--per_device_train_batch_size {max(training.per_device_train_batch_size // 2, 1)}"
    parts = {
        "activations": smaller_batch if training.gradient_checkpointing else "--gradient_checkpointing True",
        "recomputed": smaller_batch,
        "head_gradient": "--training_recipe lora",
        "logits": f"--chunk_size {(distill.chunk_size or 256) // 2}",
        "optimizer": "--deepspeed zero2_offload.json, or --training_recipe lora",
        "weights": "--deepspeed zero3.json on more GPUs",
        "gradients": "--deepspeed zero2.json on more GPUs",
        "teacher": "a smaller teacher" if distill.teacher_bits == 4 else "--teacher_bits 4, or a smaller teacher",
    }
    largest = max(parts, key=lambda name: getattr(result, name))
    return f"{largest} take the most; try {parts[largest]}"


def _student_bytes(student: TinyLlava, batch: int, length: int, checkpointing: bool, size: int) -> int:
    def run() -> Tensor:
        pixels = torch.empty(batch, 3, student.image_size, student.image_size, device="meta")
        return _decode(student, student.connector(student.vision_features(pixels)), length)

    return _saved(run, [student], student.train(), checkpointing, size)


def _switch_bytes(
    student: TinyLlava, teacher: TinyLlava, batch: int, length: int, checkpointing: bool, size: int, bits: int
) -> int:
    sees = any(p.requires_grad for p in student.vision_tower.parameters())

    def run() -> Tensor:
        # in the teacher's shape: if the towers' shapes differ, a trained bridge converts the features
        tokens = teacher.vision_tower.num_tokens(teacher.config.vision_feature_select_strategy)
        learns = sees or differ(student, teacher) is not None
        features = torch.empty(batch, tokens, teacher.config.vision_hidden_size, device="meta", requires_grad=learns)
        return _decode(teacher, teacher.connector(features), length)

    # bitsandbytes' 8-bit layers keep their inputs; an ordinary frozen linear layer does not
    keeping = linears_to_quantize(teacher) if bits == 8 and not checkpointing else []
    return _saved(run, [student, teacher], teacher.language_model.train(checkpointing), checkpointing, size, keeping)


def _decode(model: TinyLlava, visual: Tensor, length: int) -> Tensor:
    embeddings = model.get_input_embeddings()
    ids = torch.zeros(visual.shape[0], length - visual.shape[1], dtype=torch.long, device="meta")
    inputs = torch.cat([visual, embeddings(ids)], dim=1)
    return model.language_model.get_decoder()(inputs_embeds=inputs, use_cache=False).last_hidden_state


def _saved(
    run: Callable[[], Tensor],
    models: list[TinyLlava],
    module: TinyLlava | Task,
    checkpointing: bool,
    size: int,
    keeping: Iterable[nn.Module] = (),
) -> int:
    """Bytes that autograd keeps in one pass, without weights. A float32 element counts as `size` bytes.

    Modules in `keeping` additionally keep their inputs.
    """
    weights = {p.untyped_storage()._cdata for model in models for p in model.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (
                tensor,
                storage.nbytes() * size // 4 if tensor.dtype == torch.float32 else storage.nbytes(),
            )
        return tensor

    def keep_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        pack(inputs[0])

    hooks = [keeper.register_forward_pre_hook(keep_input) for keeper in keeping]
    if checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = run()
        return sum(size for _, size in kept.values()) + out.numel() * size
    finally:
        for hook in hooks:
            hook.remove()
        if checkpointing:
            module.gradient_checkpointing_disable()


class _FlashLike(torch.autograd.Function):
    """Attention that keeps what a fused kernel keeps: queries, keys, values, outputs and one normaliser per row."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object):
    return _FlashLike.apply(query, key, value).transpose(1, 2), None


_ATTENTION = "tinyllava_memory_estimate"


@contextmanager
def _fused_attention(*models: TinyLlava | None) -> Iterator[None]:
    """Have transformers call `_attention`; torch's own attention keeps whole score matrices on the meta device."""
    configs = {id(m.config): m.config for model in models if model for m in model.modules() if hasattr(m, "config")}
    before = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    AttentionInterface.register(_ATTENTION, _attention)
    try:
        for config in configs.values():
            config._attn_implementation = _ATTENTION
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
