import copy
import functools

import pytest
import torch
import torch.nn.functional as F

from tests.distill.conftest import make_batch, set_recompute
from tests.tiny import tiny_llava
from tinyllava_switchkd.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinyllava_switchkd.distill import LossFactory, build_distiller, objective, register_loss
from tinyllava_switchkd.distill.losses import LogitLoss
from tinyllava_switchkd.distill.methods import Method
from tinyllava_switchkd.distill.objective import LogitTerm
from tinyllava_switchkd.train.task import SupervisedTask


def gradients(task, batch, **kwargs):
    task.zero_grad()
    task(batch, **kwargs)["loss"].backward()
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    for name in ours:
        # Some gradients are zero but for rounding (a key's bias shifts every score alike).
        scale = theirs[name].abs().max().clamp(min=1e-3)
        assert torch.allclose(ours[name] / scale, theirs[name] / scale, atol=tolerance), name


@pytest.mark.parametrize("trains", [True, False])
def test_chunks_of_another_ranks_tokens_change_nothing(student, teacher, batch, trains, monkeypatch):
    """Under ZeRO-3 all ranks run their heads equally often, on empty chunks if they have fewer tokens."""
    head = student.language_model.get_output_embeddings()
    head.requires_grad_(trains)
    distiller = build_distiller(student, teacher, chunk_size=4)
    expected, losses = gradients(distiller, batch), distiller(batch)
    monkeypatch.setattr(objective, "_most_of_all_ranks", lambda count, device: count + 2)
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    head.weight.ds_id = 0  # DeepSpeed's mark
    for name, value in distiller(batch).items():
        assert torch.isclose(value, losses[name], rtol=1e-5), name
    assert len(calls) == -(-int(losses["supervised_tokens"]) // 4) + 2
    assert_same_gradients(gradients(distiller, batch), expected)
    calls.clear()
    assert distiller(make_batch("ipp"))["loss"] == 0 and len(calls) == 2  # supervised on another rank only


def test_what_a_rank_may_call_less_often_is_not_registered(student, teacher):
    """Under ZeRO-3 all ranks must call registered modules in the same order, or they wait forever."""
    distiller = build_distiller(student, teacher)
    assert [name for name, _ in distiller.named_children()] == ["student"]

    class Scaled(LogitLoss):
        def __init__(self, temperature=3.0):
            super().__init__(temperature)
            self.register_buffer("scale", torch.ones(1))

        def forward(self, student_logits, teacher_logits, **orders):
            return (student_logits - teacher_logits).square().mean(-1) * self.scale

    register_loss("scaled")(Scaled)
    assert build_distiller(student, teacher, loss="scaled").to(torch.float64).loss.scale.dtype == torch.float64


@pytest.mark.parametrize("recompute", [False, True])
def test_every_loss_with_parameters_is_trained(student, teacher, batch, recompute, monkeypatch):
    class Weighted(LogitLoss):
        def __init__(self):
            super().__init__(1.0)
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, student_logits, teacher_logits, **orders):
            return (student_logits - teacher_logits).square().mean(-1) * self.scale

    class Two(Method):
        name = "two"

        @functools.cached_property
        def terms(self):
            return [LogitTerm(name, Weighted(), 1.0) for name in ("one", "other")]

    distiller = build_distiller(student, teacher, Two())
    set_recompute(monkeypatch, distiller, recompute)
    losses = distiller(batch)
    losses["loss"].backward()
    scales = [term.loss.scale for term in distiller.terms]
    assert len(distiller.adapters) == 2 and all(any(p is scale for p in distiller.parameters()) for scale in scales)
    assert all(
        torch.isclose(scale.grad, losses[term.name], rtol=1e-5)
        for scale, term in zip(scales, distiller.terms, strict=True)
    )


def dense(distiller, batch, dtype=torch.float64):
    """The objective with whole models and all logits, without chunks (method.md section 1)."""
    student, teacher = distiller.student, distiller.teacher
    features = student.vision_features(batch["images"])
    routes = {
        "student": student(**{**batch, "images": None}, image_features=student.connector(features)),
        "teacher": teacher(**batch),
        "switch": teacher(**{**batch, "images": None}, image_features=teacher.connector(features)),
    }
    labels = routes["student"].labels[:, 1:]
    where = labels != IGNORE_INDEX
    logits = {name: out.logits[:, :-1][where].to(dtype) for name, out in routes.items()}
    vocab = min(logits["student"].shape[1], logits["teacher"].shape[1])
    ce = F.cross_entropy(logits["student"], labels[where], reduction="sum")
    student, teacher, switch = (logits[name][:, :vocab] for name in ("student", "teacher", "switch"))
    teacher = teacher.detach()
    align = distiller.loss(student, teacher).sum()
    visual_switch = distiller.loss(switch, teacher).sum()
    tokens = int(where.sum())
    loss = ce + distiller.align_weight * align + distiller.switch_weight * visual_switch
    parts = {"loss": loss, "ce": ce, "align": align, "visual_switch": visual_switch}
    return {name: value / tokens for name, value in parts.items()}, logits


@pytest.mark.parametrize("loss", ["dbild", "bild_rkl", "rkl", "fkl"])
def test_losses_and_gradients_equal_the_dense_computation(student, teacher, batch, loss):
    distiller = build_distiller(student, teacher, loss=loss, align_weight=0.7, switch_weight=1.3)
    expected, _ = dense(distiller, batch)
    ours = distiller(batch)
    for name, value in expected.items():
        assert torch.isclose(ours[name].double(), value, rtol=1e-5), name
    assert ours["visual_switch"] > 0 and ours["align"] > 0
    computed = gradients(distiller, batch)
    distiller.zero_grad()
    expected["loss"].backward()
    theirs = {name: p.grad.clone() for name, p in distiller.named_parameters() if p.grad is not None}
    assert_same_gradients(computed, theirs, 2e-5)


@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
@pytest.mark.parametrize("recompute", [False, True])
def test_chunks_change_nothing(student, teacher, batch, chunk_size, recompute, monkeypatch):
    whole = build_distiller(student, teacher)
    expected, expected_losses = gradients(whole, batch), whole(batch)
    chunked = build_distiller(student, teacher, chunk_size=chunk_size)
    set_recompute(monkeypatch, chunked, recompute)
    assert_same_gradients(gradients(chunked, batch), expected)
    for name, value in chunked(batch).items():
        assert torch.allclose(value.float(), expected_losses[name].float(), rtol=1e-5), name


def test_pathway_logits_are_those_of_whole_models(student, teacher, batch):
    student.eval()
    distiller = build_distiller(student, teacher)
    _, expected = dense(distiller, batch, torch.float32)
    paths = distiller.pathway_logits(batch)
    text_only = []
    for row in range(len(batch["labels"])):
        count = int((batch["labels"][row] != IGNORE_INDEX).sum())
        text_only += [not bool((batch["input_ids"][row] == IMAGE_TOKEN_INDEX).any())] * count
    text_only = torch.tensor(text_only)
    assert torch.allclose(paths.student, expected["student"], atol=1e-5)
    assert torch.allclose(paths.teacher, expected["teacher"], atol=1e-5)
    assert torch.allclose(paths.visual_switch, expected["switch"], atol=1e-5)
    assert torch.equal(paths.visual_switch[text_only], paths.teacher[text_only])
    assert not torch.allclose(paths.visual_switch[~text_only], paths.teacher[~text_only], atol=1e-3)


def test_a_teacher_that_is_the_student_costs_nothing(student, batch):
    distiller = build_distiller(student, copy.deepcopy(student))
    losses = distiller(batch)
    assert abs(float(losses["align"])) < 1e-6 and abs(float(losses["visual_switch"])) < 1e-6
    assert torch.isclose(losses["loss"], losses["ce"])
    assert float(losses["topk_overlap"]) == 1.0
    paths = distiller.pathway_logits(batch)
    assert torch.allclose(paths.teacher, paths.visual_switch, atol=1e-6)


def test_the_switch_with_the_teachers_tower_gives_the_teachers_logits(student, teacher, batch):
    """With V^S := V^T the visual-switch logits are the teacher's, for any language model of the student."""
    student.vision_tower.load_state_dict(teacher.vision_tower.state_dict())
    distiller = build_distiller(student, teacher)
    paths = distiller.pathway_logits(batch)
    assert torch.allclose(paths.teacher, paths.visual_switch, atol=1e-5)
    assert abs(float(distiller(batch)["visual_switch"])) < 1e-6


def test_one_frozen_encoder_is_run_once(student, teacher, batch):
    """With the same tower in both models (pre-training with a teacher), images are encoded once, until they differ."""
    student.vision_tower.load_state_dict(teacher.vision_tower.state_dict())
    student.vision_tower.requires_grad_(False)
    expected = build_distiller(student, teacher)
    expected._one_encoder = False
    distiller = build_distiller(student, teacher, switch_weight=0.0)
    calls = []
    teacher.vision_tower.register_forward_hook(lambda *_: calls.append("teacher"))
    assert torch.isclose(distiller(batch)["align"], expected(batch)["align"]) and calls == ["teacher"]  # expected's own
    student.vision_tower.requires_grad_(True)  # it is trained from now on and will differ
    distiller(batch)
    assert calls == ["teacher"] * 2
    next(student.vision_tower.parameters()).data.add_(0.1)
    student.vision_tower.requires_grad_(False)
    build_distiller(student, teacher, switch_weight=0.0)(batch)
    assert calls == ["teacher"] * 3


def test_one_frozen_encoder_runs_again_for_pixels_of_the_teacher(student, teacher, batch):
    student.vision_tower.load_state_dict(teacher.vision_tower.state_dict())
    batch["teacher_images"] = batch["images"].flip(-1)
    expected = build_distiller(student, teacher).pathway_logits(batch).teacher
    student.vision_tower.requires_grad_(False)
    assert torch.equal(build_distiller(student, teacher).pathway_logits(batch).teacher, expected)


def test_the_switch_trains_the_vision_tower_only(student, teacher, batch):
    """The gradient of L_VSD passes through the frozen teacher into V^S only."""
    align_only = build_distiller(student, teacher, align_weight=0.0, switch_weight=0.0)
    without = gradients(align_only, batch)
    with_switch = gradients(build_distiller(student, teacher, align_weight=0.0, switch_weight=1.0), batch)
    changed = {name for name in without if not torch.allclose(without[name], with_switch[name], atol=1e-7)}
    assert changed and all(name.startswith("student.vision_tower.") for name in changed)


def test_the_teacher_stays_as_it_is(student, teacher, batch):
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    distiller = build_distiller(student, teacher)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    distiller.train()
    distiller(batch)["loss"].backward()
    optimizer.step()
    assert not teacher.training
    for name, p in teacher.named_parameters():
        assert p.grad is None and not p.requires_grad and torch.equal(p, before[name]), name


def test_the_teacher_is_never_saved_but_follows_its_student(student, teacher):
    distiller = build_distiller(student, teacher)
    assert set(distiller.state_dict()) == {f"student.{name}" for name in student.state_dict()}
    assert len(list(distiller.parameters())) == len(list(student.parameters()))
    distiller.to(torch.float64)
    assert next(teacher.parameters()).dtype == torch.float64


def test_text_only_samples_skip_the_switch(student, teacher, monkeypatch):
    seen = []
    connector_forward = type(teacher.connector).forward
    monkeypatch.setattr(
        type(teacher.connector),
        "forward",
        lambda self, x: (seen.append((self is teacher.connector, torch.is_grad_enabled())), connector_forward(self, x))[
            1
        ],
    )
    distiller = build_distiller(student, teacher)
    losses = distiller(make_batch("ppaa", "pppaaa"))
    assert float(losses["visual_switch"]) == 0.0
    assert float(losses["align"]) > 0.0
    assert not any(of_teacher for of_teacher, _ in seen)
    distiller(make_batch("ippaa", "pppaaa"))
    assert [grad for of_teacher, grad in seen if of_teacher] == [False, True]


def test_text_only_batches_reach_every_parameter(student, teacher):
    """All ranks must run the same backward pass, whatever their batch holds."""
    distiller = build_distiller(student, teacher)
    with_images = gradients(distiller, make_batch("ippaa", "pppaaa"))
    text_only = gradients(distiller, make_batch("ppaa", "pppaaa"))
    assert with_images.keys() == text_only.keys()
    assert all((grad == 0).all() for name, grad in text_only.items() if "vision_tower" in name or "connector" in name)


@pytest.mark.parametrize("images", ["none", "missing"])
def test_a_text_only_batch_may_come_without_images(student, teacher, images):
    batch = make_batch("ppaa", "pppaaa")
    expected = build_distiller(student, teacher)(batch)
    batch["images"] = None
    if images == "missing":
        del batch["images"]
    assert torch.equal(build_distiller(student, teacher)(batch)["loss"], expected["loss"])


def test_dummy_images_of_version_1_are_skipped(student, teacher, batch):
    expected = build_distiller(student, teacher)(batch)
    images = batch["images"]
    batch["images"] = torch.cat([images[:2], torch.zeros_like(images[:1]), images[2:]])
    assert torch.allclose(build_distiller(student, teacher)(batch)["loss"], expected["loss"])


@pytest.mark.parametrize("task", ["supervised", "switch"])
def test_a_batch_without_supervision_gives_zero_not_nan(student, teacher, task):
    made = SupervisedTask(student) if task == "supervised" else build_distiller(student, teacher)
    losses = made(make_batch("ippp", "ppp"))
    assert float(losses["loss"].detach()) == 0.0
    losses["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_a_sample_with_an_image_but_no_supervision(student, teacher):
    losses = build_distiller(student, teacher)(make_batch("ippp", "ppaa"))
    assert float(losses["visual_switch"]) == 0.0 and float(losses["align"]) > 0.0


def test_micro_batches_add_up_to_the_batch(student, teacher, batch):
    """Sums are divided by the step's token count, so accumulation is exact for any division into micro-batches."""
    distiller = build_distiller(student, teacher)
    whole = gradients(distiller, batch)
    tokens = int((batch["labels"] != IGNORE_INDEX).sum())
    distiller.zero_grad()
    image = total = 0
    for row in range(len(batch["labels"])):
        count = int((batch["input_ids"][row] == IMAGE_TOKEN_INDEX).sum())
        part = {key: batch[key][row : row + 1] for key in ("input_ids", "labels", "attention_mask")}
        part["images"] = batch["images"][image : image + count] if count else torch.zeros_like(batch["images"][:1])
        image += count
        losses = distiller(part, num_items_in_batch=tokens)
        losses["loss"].backward()
        total += losses["loss"].detach()
    accumulated = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
    assert torch.isclose(total, distiller(batch)["loss"].detach(), rtol=1e-5)
    assert_same_gradients(accumulated, whole)


def test_supervised_task_is_the_models_own_loss(student, batch):
    task = SupervisedTask(student)
    ours = gradients(task, batch)
    student.zero_grad()
    loss = student(**batch).loss
    loss.backward()
    assert torch.isclose(task(batch)["loss"], loss, rtol=1e-5)
    theirs = {f"student.{name}": p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert_same_gradients(ours, theirs)


def test_unequal_heads_are_cut_for_distillation_and_whole_for_cross_entropy(student, batch):
    teacher = tiny_llava(seed=2, vocab=student.config.vocab_size + 16)
    distiller = build_distiller(student, teacher)
    assert distiller.vocab_size == student.config.vocab_size
    assert distiller.pathway_logits(batch).teacher.shape[1] == student.config.vocab_size
    expected, _ = dense(distiller, batch)
    assert torch.isclose(distiller(batch)["loss"].double(), expected["loss"], rtol=1e-5)

    wide = tiny_llava(seed=3, vocab=student.config.vocab_size + 16).requires_grad_(True)
    distiller = build_distiller(wide, tiny_llava(seed=4))
    expected, logits = dense(distiller, batch)
    assert logits["student"].shape[1] == wide.config.vocab_size
    assert torch.isclose(distiller(batch)["ce"].double(), expected["ce"], rtol=1e-5)


def test_an_untied_head_learns(batch):
    student = tiny_llava(seed=1, text={"tie_word_embeddings": False}).requires_grad_(True)
    distiller = build_distiller(student, tiny_llava(seed=2), chunk_size=2)
    expected, _ = dense(distiller, batch)
    computed = gradients(distiller, batch)
    distiller.zero_grad()
    expected["loss"].backward()
    head = "student.language_model.lm_head.weight"
    assert_same_gradients({head: computed[head]}, {head: student.language_model.lm_head.weight.grad})


def saved_bytes(task, batch) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once."""
    storages: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in task.student.parameters()}
    if hasattr(task, "teacher"):
        parameters |= {p.untyped_storage().data_ptr() for p in task.teacher.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task(batch)["loss"]
    total = sum(storages.values())
    del loss
    return total


def test_checkpointing_the_switch_pass_really_saves_memory(student, batch):
    """transformers ignores checkpointing outside training mode, so count the saved bytes and do not trust the flag."""
    teacher = tiny_llava(seed=2, text={"hidden": 64, "layers": 8})
    student.requires_grad_(False)
    student.vision_tower.requires_grad_(True)
    distiller = build_distiller(student, teacher, align_weight=0.0)
    plain, expected = saved_bytes(distiller, batch), gradients(distiller, batch)
    distiller.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert saved_bytes(distiller, batch) < 0.6 * plain
    assert_same_gradients(gradients(distiller, batch), expected)


def test_a_frozen_teacher_keeps_fewer_bytes_than_a_trainable_one(student, teacher, batch):
    frozen = build_distiller(student, teacher)
    fewer = saved_bytes(frozen, batch)
    teacher.requires_grad_(True)
    assert fewer < saved_bytes(frozen, batch)


def test_no_logits_of_the_whole_batch_ever_exist(student, teacher, batch, monkeypatch):
    """Only supervised positions reach a head, one chunk at a time."""
    rows = []
    for model in (student, teacher):
        model.language_model.lm_head.register_forward_hook(
            lambda module, args, out: rows.append(out.shape[:-1].numel())
        )
    build_distiller(student, teacher, chunk_size=4)(batch)
    tokens = int((batch["labels"] != IGNORE_INDEX).sum())
    assert max(rows) == 4
    assert sum(rows) == 3 * tokens - 2  # three pathways; the text-only sample's two tokens skip the switch


def test_dropout_in_the_teacher_is_silenced(student, batch):
    teacher = tiny_llava(seed=2, text={"attention_dropout": 0.5})
    distiller = build_distiller(student, teacher, gradient_checkpointing=True)
    assert torch.equal(distiller(batch)["visual_switch"], distiller(batch)["visual_switch"])


def test_metrics_describe_the_align_term(student, teacher, batch):
    distiller = build_distiller(student, teacher)
    losses, paths = distiller(batch), distiller.pathway_logits(batch)
    from tinyllava_switchkd.distill import knee

    teachers, students = knee(paths.teacher), knee(paths.student)
    assert torch.isclose(losses["knee_teacher"], teachers.float().mean())
    assert torch.isclose(losses["knee_student"], students.float().mean())
    shares = []
    for t, s, kt, ks in zip(paths.teacher, paths.student, teachers, students, strict=True):
        theirs = set(t.argsort(descending=True, stable=True)[:kt].tolist())
        ours = set(s.argsort(descending=True, stable=True)[:ks].tolist())
        shares.append(len(theirs & ours) / len(theirs))
    assert torch.isclose(losses["topk_overlap"], torch.tensor(shares).mean())
    assert int(losses["supervised_tokens"]) == len(paths.teacher)


def test_a_loss_without_order_reports_no_knee(student, teacher, batch):
    assert "knee_teacher" not in build_distiller(student, teacher, loss="rkl")(batch)


def test_a_plain_module_serves_as_a_loss(student, teacher, batch):
    from tinyllava_switchkd.distill import register_loss

    @register_loss("test_cosine")
    class Cosine(torch.nn.Module):
        def __init__(self, temperature=3.0):
            super().__init__()

        def forward(self, student_logits, teacher_logits):
            return 1 - F.cosine_similarity(student_logits, teacher_logits, dim=-1)

    losses = build_distiller(student, teacher, loss="test_cosine")(batch)
    assert float(losses["align"]) > 0 and "knee_teacher" not in losses
    assert LossFactory("test_cosine") is Cosine
