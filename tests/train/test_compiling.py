"""torch.compile of the layers: the same numbers, few compilations, nothing else changed."""

import pytest
import torch
from safetensors.torch import load_file

from tests.distill.conftest import make_batch
from tests.distill.test_switch import assert_same_gradients, gradients, saved_bytes
from tests.tiny import tiny_llava
from tests.train.toy import largest_difference, toy_arguments, toy_trainer, weights
from tinyllava_switchkd.distill import build_distiller
from tinyllava_switchkd.train.compiling import check_compile, compile_layers
from tinyllava_switchkd.train.preflight.checks import check_gradient_shares
from tinyllava_switchkd.train.recipes import TrainingRecipeFactory
from tinyllava_switchkd.train.task import SupervisedTask

ONE_LAYER = {"text": {"layers": 1}, "vision": {"layers": 2}}  # the tower's last layer is not used


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No test sees another's compilations, counters or limit."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def task(distil=True, **kwargs):
    student = tiny_llava(seed=1, **ONE_LAYER).train()
    student.freeze_unused_parameters()
    if not distil:
        return SupervisedTask(student, **kwargs)
    return build_distiller(student, tiny_llava(seed=2, **{**ONE_LAYER, "text": {"hidden": 48, "layers": 2}}), **kwargs)


@pytest.mark.parametrize("packing", [False, True])
def test_other_lengths_and_numbers_of_images_need_no_other_compilation(packing):
    """Five kinds of pass: two towers, the student, the teacher with and without gradient; packed, the student's."""
    compiled, eager = (task(distil=not packing, packing=packing) for _ in range(2))
    names = set(compiled.state_dict())
    assert compile_layers(compiled, "eager") == (2 + 1 if packing else 2 + 1 + 2 + 2)
    stats = torch._dynamo.utils.counters["stats"]
    seen = []
    for samples in (
        ("ippaaa", "pipppaapaaa", "pppaa", "iipaaaa"),
        ("ippaaa" + "a" * 5, "pipp"),
        ("ippaaa" + "a" * 9, "pipp", "pa"),
        ("ippaaa" + "a" * 30, "pppiia", "ia"),
    ):
        batch = make_batch(*samples)
        assert_same_gradients(gradients(compiled, batch), gradients(eager, batch), 1e-6)
        seen.append(stats["unique_graphs"])
    assert 0 < seen[0] <= 8 and seen == seen[:1] * 4
    assert not torch._dynamo.utils.counters["graph_break"]
    assert set(compiled.state_dict()) == names
    # Batches of one sample and larger ones together exceed torch's limit of eight variants, but stay compiled.
    compiled(make_batch("ippaaa"))["loss"].backward()
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] > (3 if packing else 8)


def test_checkpointing_saves_as_much_compiled():
    compiled, eager = (task(distil=False), task(distil=False))
    batch = make_batch("ippaaa", "pipppaapaaa", "pppaa", "iipaaaa")
    for either in (compiled, eager):
        either.student.vision_tower.requires_grad_(False)
        either.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compile_layers(compiled, "aot_eager")
    checkpointed = saved_bytes(eager, batch)
    eager.gradient_checkpointing_disable()
    assert saved_bytes(compiled, batch) < 1.1 * checkpointed < 0.6 * saved_bytes(eager, batch)
    assert_same_gradients(gradients(compiled, batch), gradients(eager, batch))


def test_gradients_of_each_term_are_those_of_eager_layers():
    """Several backward passes need a graph's buffers, which compiled code otherwise overwrites."""
    batch = make_batch("ippaaa", "pipppaapaaa")
    compiled, eager = task(), task()
    with torch._functorch.config.patch(donated_buffer=True):
        compile_layers(compiled, "aot_eager", retain_graph=True)
        ours, theirs = compiled.gradient_norms(batch), eager.gradient_norms(batch)
    for place, terms in theirs.items():
        assert ours[place] == pytest.approx(terms, rel=1e-5)


@pytest.mark.slow
def test_inductor_gives_the_same_losses_and_gradients():
    compiled, eager = task(distil=False), task(distil=False)
    for either in (compiled, eager):
        either.student.vision_tower.requires_grad_(False)
    compile_layers(compiled)
    batch = make_batch("ippaaa", "pipppaapaaa")
    assert torch.isclose(compiled(batch)["loss"], eager(batch)["loss"], rtol=1e-6)
    assert_same_gradients(gradients(compiled, batch), gradients(eager, batch))


def test_training_compiled_equals_training_eagerly(tmp_path):
    """Through the trainer, with adapters and checkpointing; checkpoints have the ordinary parameter names."""
    lora = {"training_recipe": "lora", "tune_type_llm": "lora", "tune_type_vision_tower": "frozen", "lora_dropout": 0.0}
    steps = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    results = []
    for name in ("eager", "compiled", "resumed"):
        folder = tmp_path / name.replace("resumed", "compiled")
        compiled = {} if name == "eager" else {"torch_compile": True, "torch_compile_backend": "eager"}
        args = toy_arguments(folder, optim="sgd", gradient_checkpointing=True, **lora, **steps, **compiled)
        torch.manual_seed(0)
        recipe = TrainingRecipeFactory("lora")(args)
        trained = SupervisedTask(recipe(tiny_llava(**ONE_LAYER)))
        trainer = toy_trainer(args, trained, recipe=recipe)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1") if name == "resumed" else None)
        assert trainer.model_wrapped is trainer.model is trained  # accelerate has compiled nothing else
        layer = trained.student.language_model.model.layers[0]
        assert (layer._compiled_call_impl is not None) == bool(compiled)
        results.append(weights(trained))
    assert largest_difference(results[0], results[1]) < 1e-6
    assert largest_difference(results[1], results[2]) < 1e-7
    files = [tmp_path / name / "checkpoint-2" / "adapter_model.safetensors" for name in ("eager", "compiled")]
    saved = [load_file(file) for file in files]
    assert saved[0].keys() == saved[1].keys()


def test_layers_of_bitsandbytes_are_left_alone(monkeypatch):
    distiller = task()
    quantised = type("Linear4bit", (torch.nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    for layer in distiller.teacher.language_model.model.layers:
        layer.mlp.up_proj.__class__ = quantised
    assert compile_layers(distiller, "eager") == 2 + 1 + 2
    assert distiller.teacher.language_model.model.layers[0]._compiled_call_impl is None


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"torch_compile_backend": "nonsense"}, "--torch_compile_backend is 'nonsense'; torch has .*inductor"),
        ({"torch_compile_mode": "fast"}, "--torch_compile_mode is 'fast' .*max-autotune"),
        ({"torch_compile_mode": "default", "torch_compile_backend": "eager"}, "backend 'eager'; only inductor"),
    ],
)
def test_unknown_backends_and_modes_are_refused(tmp_path, kwargs, words):
    with pytest.raises(ValueError, match=words):
        check_compile(toy_arguments(tmp_path, **kwargs))


def test_zero_3_is_refused(tmp_path):
    args = toy_arguments(tmp_path, torch_compile=True)
    check_compile(args)
    args.hf_deepspeed_config = type("Config", (), {"is_zero3": lambda self: True})()
    with pytest.raises(ValueError, match="--torch_compile does not work with ZeRO-3"):
        check_compile(args)
    args.torch_compile, args.log_gradient_shares = False, 1
    with pytest.raises(ValueError, match="--log_gradient_shares 1 does not work with ZeRO-3"):
        check_gradient_shares(args)
