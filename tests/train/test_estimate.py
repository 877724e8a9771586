import pytest
import torch

from tests.distill.conftest import make_batch
from tests.tiny import tiny_llava
from tinyllava_switchkd.distill import build_distiller
from tinyllava_switchkd.distill.trace import splice_batch
from tinyllava_switchkd.model.quantized import weight_bytes
from tinyllava_switchkd.train.preflight.estimate import estimate
from tinyllava_switchkd.train.train import main

TEXT = {"hidden": 64, "layers": 4, "max_position_embeddings": 1024}


def pair(device):
    with torch.device(device):
        student = tiny_llava(seed=1, text=TEXT).train()
        teacher = tiny_llava(seed=2, text={**TEXT, "layers": 6}).requires_grad_(False)
    student.requires_grad_(True)
    student.freeze_unused_parameters()
    return student, teacher


def kept_bytes(run, models):
    """Bytes that autograd keeps in a pass on real tensors, each storage once, without weights."""
    weights = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return sum(size for _, size in storages.values()) + out.numel() * 4


def test_activations_are_those_of_a_real_pass():
    student, teacher = pair("cpu")
    batch = make_batch(*["i" + "p" * 100 + "a" * 100] * 2)
    features = student.vision_features(batch["images"])

    def decode(model, features):
        inputs = splice_batch(model, batch, model.connector(features)).inputs_embeds
        return model.language_model.get_decoder()(inputs_embeds=inputs, use_cache=False).last_hidden_state

    def passes():
        ours = decode(student, student.vision_features(batch["images"]))
        return ours.sum() + decode(teacher, features.detach().requires_grad_()).sum()

    real = kept_bytes(passes, (student, teacher))
    on_meta, guide = pair("meta")
    predicted = estimate(on_meta, guide, batch_size=2, text_tokens=200, mixed_precision=False).activations
    assert predicted == pytest.approx(real, rel=0.15)


def test_resident_parts_are_counted_exactly():
    student, teacher = pair("meta")
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    every = sum(p.numel() for p in student.parameters())
    alone = estimate(student, teacher, batch_size=1, text_tokens=40)
    assert (alone.weights, alone.gradients, alone.optimizer) == (2 * every, 2 * trained, 12 * trained)
    assert alone.teacher == 2 * sum(p.numel() for p in teacher.parameters())
    sharded = estimate(student, teacher, batch_size=1, text_tokens=40, gpus=8, zero_stage=2)
    assert (sharded.weights, sharded.gradients, sharded.optimizer) == (2 * every, 2 * trained // 8, 12 * trained // 8)
    assert estimate(student, teacher, batch_size=1, text_tokens=40, offload=True).optimizer == 0


def test_a_quantised_teacher_takes_less_and_in_8_bits_keeps_inputs():
    """Measured on these shapes, activations with 8 bits were 1.49 times those of the plain teacher."""
    student, teacher = pair("meta")
    runs = {
        (bits, checkpointing): estimate(
            student, teacher, batch_size=2, text_tokens=200, teacher_bits=bits, checkpointing=checkpointing
        )
        for bits in (16, 8, 4)
        for checkpointing in (False, True)
    }
    assert runs[8, False].teacher == weight_bytes(teacher, 2, 8) < runs[16, False].teacher
    activations = {key: run.activations for key, run in runs.items()}
    alone = estimate(student, teacher, batch_size=2, text_tokens=200, switch=False).activations
    assert (activations[8, False] - alone) / (activations[16, False] - alone) == pytest.approx(1.49, rel=0.15)
    assert activations[4, False] == activations[16, False]
    assert activations[8, True] < 0.3 * activations[8, False]


def test_settings_that_save_memory_lower_the_estimate():
    student, teacher = pair("meta")
    plain = estimate(student, teacher, batch_size=4, text_tokens=400)
    assert estimate(student, teacher, batch_size=4, text_tokens=400, checkpointing=True).peak < plain.peak
    assert estimate(student, teacher, batch_size=4, text_tokens=400, switch=False).activations < plain.activations
    assert estimate(student, teacher, batch_size=4, text_tokens=400, chunk_size=64).logits < plain.logits
    assert estimate(student, None, batch_size=4, text_tokens=400).peak < plain.peak
    twice = estimate(student, teacher, batch_size=8, text_tokens=400).activations
    assert twice == pytest.approx(2 * plain.activations, rel=0.01)


def test_the_distiller_is_as_before():
    """Estimating replaces the models' attention and restores it."""
    student, teacher = pair("meta")
    before = student.config.text_config._attn_implementation
    estimate(student, teacher, batch_size=1, text_tokens=40)
    assert student.config.text_config._attn_implementation == before
    build_distiller(student, teacher)


def test_the_command_prints_and_trains_nothing(tmp_path, capsys):
    from tests.tiny import write_tiny_llm, write_tiny_tower

    (tmp_path / "data.json").write_text("[]")
    arguments = {
        "data_path": tmp_path / "data.json",
        "model_name_or_path": write_tiny_llm(tmp_path / "llm-qwen2"),
        "vision_tower": write_tiny_tower(tmp_path / "tower-siglip"),
        "connector_type": "mlp2x_gelu",
        "output_dir": tmp_path / "out",
        "use_cpu": True,
        "estimate": True,
    }
    code = main([word for name, value in arguments.items() for word in (f"--{name}", str(value))])
    out = capsys.readouterr().out
    assert code == 0 and "activations" in out and "peak" in out
    assert not (tmp_path / "out").exists()


def test_under_autocast_the_teacher_alone_is_halved():
    student, teacher = pair("meta")
    settings = {"batch_size": 2, "text_tokens": 50, "mixed_precision": False}
    full, half = (estimate(student, teacher, **settings, half_teacher=flag) for flag in (False, True))
    assert (half.weights, half.optimizer, half.teacher) == (full.weights, full.optimizer, full.teacher // 2)
    alone = estimate(student, None, **settings).activations
    assert half.activations - alone == pytest.approx((full.activations - alone) / 2, rel=0.01)
