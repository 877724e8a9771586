"""Each method compared with its equations, written as loops over whole models in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F

from tests.distill.conftest import make_batch
from tests.tiny import tiny_llava
from tinyllava_switchkd.constants import IGNORE_INDEX
from tinyllava_switchkd.distill import MethodFactory, build_distiller
from tinyllava_switchkd.distill.methods.align_kd import HeadMap
from tinyllava_switchkd.distill.methods.llava_kd import gram, related


@pytest.fixture
def pair():
    """A student and a wider teacher with more heads, in float64."""
    student = tiny_llava(seed=1).double().train().requires_grad_(True)
    student.freeze_unused_parameters()
    text = {"hidden": 48, "layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6}
    return student, tiny_llava(seed=2, text=text).double()


def test_the_relation_is_computed_in_float32(monkeypatch):
    """Also where the trainer computes in bfloat16, as when gradients of single terms are measured."""
    from tinyllava_switchkd.distill.methods import llava_kd

    seen, related = [], llava_kd.related
    monkeypatch.setattr(
        llava_kd, "related", lambda *given: seen.append(torch.is_autocast_enabled("cpu")) or related(*given)
    )
    distiller = build_distiller(tiny_llava(seed=1), tiny_llava(seed=2), "llava_kd")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distiller(make_batch("ippaa"))
        distiller.gradient_norms(make_batch("ippaa"))
    assert len(seen) == 4 and not any(seen)


def double(batch):
    return {**batch, "images": batch["images"].double()}


def whole(model, batch):
    """Logits, labels and masks of a whole model, with every attention map."""
    used = model.language_model.config._attn_implementation
    model.language_model.set_attn_implementation("eager")
    visual = model.encode_images(batch["images"])
    out = model(**{**batch, "images": None}, image_features=visual, output_attentions=True)
    model.language_model.set_attn_implementation(used)
    return out, visual


def kl(p, q):
    """KL(p || q) of two rows of logits."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum()


def answers(out):
    """(sample, position) pairs that predict a supervised token."""
    return [(b, t) for b, row in enumerate(out.labels[:, 1:]) for t, label in enumerate(row) if label != IGNORE_INDEX]


def gradients_of(task, loss):
    task.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


def assert_like(task, ours, expected, weights, tolerance=1e-6):
    """Values of the terms, and the gradient of their weighted sum with cross-entropy."""
    for name, value in expected.items():
        torch.testing.assert_close(ours[name].double(), value.detach(), rtol=1e-6, atol=1e-8, msg=name)
    total = sum(weights.get(name, 1.0) * value for name, value in expected.items())
    torch.testing.assert_close(ours["loss"], total, rtol=tolerance, atol=tolerance)
    mine, theirs = gradients_of(task, ours["loss"]), gradients_of(task, total)
    for name in theirs:  # transformers' norms compute in float32 whatever the dtype
        error = (mine[name] - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-3)
        assert error < 2e-5, (name, float(error))


BATCHES = {
    "mixed": ("ippaaa", "pipppaapaaa", "pppaa", "iipaaaa"),
    "one": ("pippaa",),
    "text only": ("pppaa", "ppaaa"),
}


def llava_kd_by_loops(student, teacher, batch):
    (out, _), (guide, _) = whole(student, batch), whole(teacher, batch)
    vocab = min(out.logits.shape[-1], guide.logits.shape[-1])
    places = answers(out)
    ce = sum(-out.logits[b, t].log_softmax(-1)[out.labels[b, t + 1]] for b, t in places) / len(places)
    z_s, z_t = out.logits[..., :vocab], guide.logits[..., :vocab].detach()
    response = sum(kl(z_t[b, t], z_s[b, t]) for b, t in places) / len(places)
    visual, relation, tokens, samples = z_s.sum() * 0, z_s.sum() * 0, 0, 0
    for b, mask in enumerate(out.image_mask):
        columns = mask.nonzero()[:, 0].tolist()
        for t in columns:
            visual, tokens = visual + kl(z_t[b, t], z_s[b, t]), tokens + 1
        if columns:
            r_s, r_t = (z[b, columns] @ z[b, columns].T for z in (z_s, z_t))
            relation, samples = relation + 1 - F.cosine_similarity(r_s.flatten(), r_t.flatten(), dim=0), samples + 1
    return {
        "ce": ce,
        "response": response,
        "visual": visual / max(tokens, 1),
        "relation": relation / max(samples, 1),
    }


@pytest.mark.parametrize("samples", BATCHES)
@pytest.mark.parametrize("heads", ["tied", "untied, unequal", "with bias"])
def test_llava_kd_is_its_equations(pair, samples, heads):
    student, teacher = pair
    if heads == "untied, unequal":
        student = tiny_llava(seed=1, text={"tie_word_embeddings": False}).double().train().requires_grad_(True)
        teacher = tiny_llava(seed=2, vocab=student.config.vocab_size + 16, text={"hidden": 48}).double()
    if heads == "with bias":
        student = tiny_llava("phi", seed=1).double().train().requires_grad_(True)
        torch.nn.init.normal_(student.language_model.lm_head.bias)
    student.freeze_unused_parameters()
    batch = double(make_batch(*BATCHES[samples]))
    task = build_distiller(student, teacher, method="llava_kd", chunk_size=4)
    expected = llava_kd_by_loops(student, teacher, batch)
    assert_like(task, task(batch), expected, {"relation": 0.5})


def test_one_gram_matrix_stands_for_the_whole_vocabulary():
    """Y Y^T = H (W^T W) H^T in value and gradient, W trained too."""
    head = torch.nn.Linear(6, 40).double()
    hidden = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    logits = head(hidden)[:, :37]
    factor = torch.randn(9, 9, dtype=torch.float64)
    inputs = (hidden, head.weight, head.bias)
    dense = torch.autograd.grad(((logits @ logits.T) * factor).sum(), inputs)
    ours = related(hidden, gram(head, 37))
    torch.testing.assert_close(ours, (logits @ logits.T), rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(torch.autograd.grad((ours * factor).sum(), inputs), dense, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    plain = gram(head, 37)
    head.weight.ds_id = 0  # ZeRO-3's mark: the weight is then read through the module
    torch.testing.assert_close(gram(head, 37), plain, rtol=1e-10, atol=1e-10)


def test_logits_of_visual_tokens_exist_a_chunk_at_a_time(student, teacher, batch):
    rows = []
    for model in (student, teacher):
        model.language_model.lm_head.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    build_distiller(student, teacher, method="llava_kd", chunk_size=7)(batch)
    assert max(rows) == 7 and sum(rows) > 2 * 4 * student.num_image_tokens


def align_kd_by_loops(task, student, teacher, batch, top=16):
    (out, v_s), (guide, v_t) = whole(student, batch), whole(teacher, batch)
    places = answers(out)
    ce = sum(-out.logits[b, t].log_softmax(-1)[out.labels[b, t + 1]] for b, t in places) / len(places)
    result = {
        "ce": ce,
        "logits": sum(kl(out.logits[b, t], guide.logits[b, t].detach()) for b, t in places) / len(places),
    }
    f_v, f_a = task.adapters["features"], task.adapters["attention_heads"].weight
    features = features_top = attention = ce * 0
    images = samples = 0
    for b, mask in enumerate(out.image_mask):
        length = int((batch["attention_mask"][b]).sum() + mask.sum() - (batch["input_ids"][b] == -200).sum())
        visual = [t for t in range(length) if mask[t]]
        text = [t for t in range(length) if not mask[t]]
        if not visual:
            continue
        a_s, a_t = (o.attentions[0][b][:, text][:, :, visual] for o in (out, guide))
        a_t = a_t.detach()
        mapped = torch.stack([sum(f_a[s, t] * a_t[t] for t in range(len(a_t))) for s in range(len(a_s))])
        attention, samples = attention + (mapped - a_s).square().mean(), samples + 1
        received = a_t.mean(0).sum(0)
        per_image = student.num_image_tokens
        for number in range(len(visual) // per_image):
            theirs, ours = f_v(v_t[images].detach()), v_s[images]
            features = features + (theirs - ours).square().mean()
            best = received[number * per_image : (number + 1) * per_image].argsort(descending=True)[:top]
            features_top = features_top + (theirs[best] - ours[best]).square().mean()
            images += 1
    result |= {name: value / max(images, 1) for name, value in (("features", features), ("features_top", features_top))}
    return {**result, "attention": attention / max(samples, 1)}


@pytest.mark.parametrize("samples", [name for name in BATCHES if name != "text only"])
@pytest.mark.parametrize("top", [4, 16])
def test_align_kd_is_its_equations(pair, samples, top):
    student, teacher = pair
    batch = double(make_batch(*BATCHES[samples]))
    task = build_distiller(student, teacher, method="align_kd", top=top)
    torch.nn.init.normal_(task.adapters["attention_heads"].weight)
    assert_like(task, task(batch), align_kd_by_loops(task, student, teacher, batch, top), {})


def test_align_kd_packed_is_align_kd(pair):
    student, teacher = pair
    batch = double(make_batch(*BATCHES["mixed"]))
    expected = build_distiller(student, teacher, method="align_kd")
    packed = build_distiller(student, teacher, method="align_kd", packing=True)
    packed.adapters = expected.adapters
    for name, value in packed(batch).items():
        torch.testing.assert_close(value, expected(batch)[name], msg=name)


class TestAlignKDWithoutTheMistakesOfItsReleasedCode:
    """One test for each of the six."""

    @pytest.fixture
    def task(self, pair):
        return build_distiller(*pair, method="align_kd", logits_weight=0.0)

    def test_1_the_attention_of_text_on_vision_is_compared_and_not_its_transpose(self, task):
        """Causal attention of vision on later text is zero: the loss would not depend on the student at all."""
        losses = task(double(make_batch("pippaa")))
        grads = gradients_of(task, losses["loss"] - losses["ce"])
        assert losses["attention"] > 0
        layer = "student.language_model.model.layers.0.self_attn"
        assert grads[f"{layer}.q_proj.weight"].abs().max() > 0 and grads[f"{layer}.k_proj.weight"].abs().max() > 0

    def test_2_the_image_may_stand_anywhere(self, task):
        """After a prompt, visual tokens are those of the image, not positions 1 to N."""
        seen = []
        task.adapters["features"].register_forward_hook(lambda module, args, out: seen.append(args[0]))
        batch = double(make_batch("pppppippaa"))
        task(batch)
        torch.testing.assert_close(seen[0], task.teacher.encode_images(batch["images"]))

    def test_3_the_top_tokens_are_those_that_text_attends_to(self, task, pair):
        """A token that only visual tokens, or no tokens, attend to is never chosen."""
        student, teacher = pair
        batch = double(make_batch("pppippaa"))
        out, _ = whole(teacher, batch)
        visual, text = out.image_mask[0], ~out.image_mask[0]
        received = out.attentions[0][0].mean(0)[text][:, visual].sum(0)
        one = build_distiller(student, teacher, method="align_kd", top=1)
        one.adapters = task.adapters
        mapped = one.adapters["features"](teacher.encode_images(batch["images"]))
        error = (mapped - student.encode_images(batch["images"])).square().mean(-1)
        torch.testing.assert_close(one(batch)["features_top"], error[0, received.argmax()].detach(), check_dtype=False)

    def test_4_the_adapters_are_trained(self, task):
        optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
        before = copy.deepcopy(task.adapters.state_dict())
        task(double(make_batch("pippaa")))["loss"].backward()
        optimizer.step()
        assert all(not torch.equal(value, before[name]) for name, value in task.adapters.state_dict().items())

    def test_5_logits_are_compared_on_answers_by_reverse_kl(self, pair):
        student, teacher = pair
        batch = double(make_batch("pippaa", "pppaa"))
        (out, _), (guide, _) = whole(student, batch), whole(teacher, batch)
        expected = torch.stack([kl(out.logits[b, t], guide.logits[b, t]) for b, t in answers(out)]).mean()
        torch.testing.assert_close(
            build_distiller(student, teacher, method="align_kd")(batch)["logits"].double(),
            expected.detach(),
            rtol=1e-6,
            atol=0,
        )

    def test_6_only_the_first_layer_is_recorded_and_no_kernel_changes(self, task, monkeypatch):
        """The released code needs eager attention everywhere; here one layer records queries and keys."""
        from tinyllava_switchkd.distill import trace

        layers = []
        record = trace._record
        monkeypatch.setitem(
            trace.ALL_ATTENTION_FUNCTIONS,
            trace.RECORDING,
            lambda m, *a, **k: (layers.append(m.layer_idx), record(m, *a, **k))[1],
        )
        expected = build_distiller(task.student, task.teacher)(double(make_batch("pippaa")))["ce"]
        assert torch.equal(task(double(make_batch("pippaa")))["ce"], expected)
        assert layers == [0, 0]  # student and teacher
        assert task.student.language_model.config._attn_implementation == "sdpa"


def test_the_map_of_heads_begins_as_a_mean_of_groups():
    assert torch.equal(HeadMap(4, 2).weight, torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]))
    assert torch.equal(HeadMap(3, 3).weight, torch.eye(3))
    assert torch.equal(HeadMap(2, 4).weight, torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]))


@pytest.mark.parametrize("method", MethodFactory.list())
class TestEveryMethod:
    def test_text_only_batches_reach_every_parameter(self, student, teacher, method):
        """All ranks must run the same backward pass, whatever their batch holds."""
        task = build_distiller(student, teacher, method=method)
        with_images = gradients_of(task, task(make_batch("ippaa", "pppaaa"))["loss"])
        text_only = gradients_of(task, task(make_batch("ppaa", "pppaaa"))["loss"])
        assert with_images.keys() == text_only.keys()
        for name, grad in text_only.items():
            if "vision_tower" in name or "connector" in name or "adapters" in name:
                assert (grad == 0).all(), name

    def test_micro_batches_add_up(self, student, teacher, method):
        task = build_distiller(student, teacher, method=method)
        rows = ("ippaaa", "pipppaapaaa", "pppaa", "iipaaaa")
        batch = make_batch(*rows)
        whole_step, counts = task(batch), task.counts(batch)
        expected = gradients_of(task, whole_step["loss"])
        task.zero_grad()
        image, sums = 0, {}
        for row, sample in enumerate(rows):
            part = {key: batch[key][row : row + 1] for key in ("input_ids", "labels", "attention_mask")}
            part["images"] = batch["images"][image : image + max(sample.count("i"), 1)]
            image += sample.count("i")
            losses = task(part, num_items_in_batch=counts["supervised"], step_counts=counts)
            losses["loss"].backward()
            for name, measure in task.measures.items():
                if not measure.of_batch:
                    sums[name] = sums.get(name, 0) + losses[name].detach()
        for name, value in sums.items():
            torch.testing.assert_close(value.float(), whole_step[name].detach().float(), rtol=1e-4, atol=1e-6, msg=name)
        for name, p in task.named_parameters():
            if p.grad is not None:
                scale = expected[name].abs().max().clamp(min=1e-3)
                torch.testing.assert_close(p.grad / scale, expected[name] / scale, rtol=0, atol=2e-5, msg=name)

    def test_checkpointing_changes_no_gradient(self, student, teacher, method):
        task, batch = build_distiller(student, teacher, method=method), make_batch("ippaaa", "pppaa")
        expected = gradients_of(task, task(batch)["loss"])
        task.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for name, grad in gradients_of(task, task(batch)["loss"]).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)

    def test_the_result_holds_each_term_under_its_name(self, student, teacher, method, batch):
        task = build_distiller(student, teacher, method=method)
        losses = task(batch)
        names = {
            "switch_kd": {"align", "visual_switch"},
            "logit_kd": {"align"},
            "llava_kd": {"response", "visual", "relation"},
            "align_kd": {"logits", "features", "features_top", "attention"},
        }[method]
        terms = {name for name, measure in task.measures.items() if measure.weight is not None}
        assert terms == names | {"ce"} and losses.keys() == set(task.measures) | {"loss", "supervised_tokens"}
        total = losses["ce"] + sum(term.weight * losses[term.name] for term in task.terms)
        torch.testing.assert_close(losses["loss"], total, rtol=1e-5, atol=1e-6)
        assert task.pathway_logits(batch).student.shape[0] == losses["supervised_tokens"]

    def test_bfloat16_stays_near(self, student, teacher, method, batch):
        expected = build_distiller(student, teacher, method=method)
        torch.manual_seed(0)
        low = build_distiller(copy.deepcopy(student).bfloat16(), copy.deepcopy(teacher).bfloat16(), method=method)
        if hasattr(low, "adapters"):
            low.adapters.load_state_dict(expected.adapters.state_dict())
        losses = low({**batch, "images": batch["images"].bfloat16()})
        losses["loss"].backward()
        for name, value in expected(batch).items():
            assert torch.isclose(losses[name].float(), value.float(), rtol=0.15, atol=0.05), name

    @pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
    def test_wrong_weights_are_refused(self, student, teacher, method, weight):
        for one in MethodFactory(method)().settings():
            if one.endswith("_weight"):
                with pytest.raises(ValueError, match=one):
                    build_distiller(student, teacher, method=method, **{one: weight})


@pytest.mark.parametrize("method", MethodFactory.list())
def test_gradient_norms_are_those_of_each_term_alone(student, teacher, batch, method):
    task = build_distiller(student, teacher, method=method)
    norms = task.gradient_norms(batch)
    assert all(p.grad is None for p in task.parameters())
    weights = {name: weight for name, measure in task.measures.items() if (weight := measure.weight) is not None}
    assert {*norms} == {"vision_features", "projector_output", "last_hidden_state"}
    fields = {one.name for one in MethodFactory(method)().settings().values() if one.name.endswith("_weight")}

    def features_gradient(**settings):
        alone = build_distiller(student, teacher, method=method, **{**dict.fromkeys(fields, 0.0), **settings})
        if hasattr(alone, "adapters"):
            alone.adapters.load_state_dict(task.adapters.state_dict(), strict=False)
        kept = []
        original = student.vision_features
        student.vision_features = lambda images: kept.append(original(images)) or kept[-1]
        loss = alone(batch)["loss"]
        del student.vision_features
        return torch.autograd.grad(loss, kept[0])[0]

    ce = features_gradient()
    torch.testing.assert_close(norms["vision_features"]["ce"], float(ce.double().norm()), rtol=1e-4, atol=1e-7)
    for name in weights.keys() - {"ce"}:
        setting = "switch_weight" if name == "visual_switch" else f"{name}_weight"
        alone = features_gradient(**{setting: weights[name]}) - ce
        torch.testing.assert_close(norms["vision_features"][name], float(alone.double().norm()), rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("method", ["llava_kd", "align_kd"])
def test_unequal_numbers_of_visual_tokens_are_refused_where_they_are_compared(student, method):
    teacher = tiny_llava(vision={"patch_size": 14})
    with pytest.raises(ValueError, match=r"15 per image and the teacher 3; .* leave out these terms") as error:
        build_distiller(student, teacher, method=method)
    off = str(error.value).split("(")[1].split(")")[0].replace("--", "").split(" 0")
    build_distiller(student, teacher, method=method, **{name.strip(): 0.0 for name in off if name.strip()})


def test_settings_of_another_method_are_refused(student, teacher):
    with pytest.raises(ValueError, match="'llava_kd' does not take align_weight"):
        build_distiller(student, teacher, method="llava_kd", align_weight=1.0)
