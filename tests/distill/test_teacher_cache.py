"""The teacher cache: a training with it is bit for bit the same, and outdated entries are never used."""

from __future__ import annotations

import multiprocessing
import shutil

import pytest
import torch

from tests.tiny import tiny_llava
from tests.train.toy import ToyDataset, toy_collator
from tinyllava_switchkd.distill import TeacherCache, build_distiller
from tinyllava_switchkd.distill.teacher_cache import tell_size

METHODS = {"align only": {"switch_weight": 0.0}, "switch": {}}


def cache_in(folder, dtype=torch.float32, teacher="t"):
    return TeacherCache(folder, teacher, dtype)


def a_student():
    model = tiny_llava(seed=1)
    model.freeze_unused_parameters()
    return model


def a_distiller(cache=None, **settings):
    distiller = build_distiller(a_student(), tiny_llava(seed=2, text={"hidden_size": 48}), **settings)
    distiller.teacher_cache = cache
    return distiller


def batches(order, size=2, data=None):
    data = data or ToyDataset(6)
    collator = toy_collator(a_student())
    collator.digests = True
    return [collator([data[i] for i in order[at : at + size]]) for at in range(0, len(order), size)]


def trained(distiller, epochs):
    """Losses of every step, and the weights."""
    optimizer = torch.optim.AdamW([p for p in distiller.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for epoch in epochs:
        for batch in epoch:
            optimizer.zero_grad()
            loss = distiller(batch)["loss"]
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses, {name: p.detach().clone() for name, p in distiller.named_parameters()}


class Passes:
    """Counts the runs of a teacher's decoder without gradient, and of its vision tower."""

    def __init__(self, distiller):
        self.own = self.tower = 0
        teacher = distiller.teacher
        teacher.language_model.get_decoder().register_forward_pre_hook(self._decoder)
        teacher.vision_tower.register_forward_pre_hook(self._tower)

    def _decoder(self, *_):
        self.own += not torch.is_grad_enabled()

    def _tower(self, *_):
        self.tower += 1


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_losses_and_weights_are_bitwise_those_without(tmp_path, settings, packing):
    epochs = [batches(range(6))] * 3
    plain = trained(a_distiller(packing=packing, **settings), epochs)
    first = a_distiller(cache_in(tmp_path), packing=packing, **settings)
    passes = Passes(first)
    kept = trained(first, epochs)
    first.teacher_cache.sync()
    assert kept[0] == plain[0] and all(torch.equal(kept[1][name], value) for name, value in plain[1].items())
    assert passes.own == 3 and passes.tower == 3  # the first epoch's batches
    second = a_distiller(cache_in(tmp_path), packing=packing, **settings)
    passes = Passes(second)
    again = trained(second, epochs)
    assert again[0] == plain[0] and all(torch.equal(again[1][name], value) for name, value in plain[1].items())
    assert passes.own == passes.tower == 0
    assert second.gradient_norms(epochs[0][0]) and passes.own == 0


def test_another_order_and_other_batches_do_not_matter(tmp_path):
    """Bit for bit with samples of equal length; otherwise the last bits differ, as in any pass of the teacher."""
    filled = a_distiller(cache_in(tmp_path))
    for batch in batches(range(6)):
        filled(batch)
    passes = Passes(filled)
    plain = a_distiller()
    for size, order in ((3, [5, 2, 0, 3, 1, 4]), (1, [0, 5]), (6, range(6)[::-1])):
        for batch in batches(order, size):
            with_cache, without = filled(batch), plain(batch)
            for name, value in without.items():
                assert torch.allclose(with_cache[name].float(), value.float(), rtol=1e-5, atol=1e-6), name
    assert passes.own == 0
    data, generator = ToyDataset(3), torch.Generator().manual_seed(1)
    for index in (0, 2):  # all of one length, with an image each
        data.samples[index] = {name: part.clone() for name, part in data.samples[1].items()}
        data.samples[index]["input_ids"][3:] = torch.randint(
            0, 250, (len(data[1]["input_ids"]) - 3,), generator=generator
        )
        data.samples[index]["images"].normal_(generator=generator)
    for batch in batches([0, 1, 2], 3, data):
        filled(batch)
    for order in ([2, 0], [1], [1, 2]):
        (batch,) = batches(order, 3, data)
        assert torch.equal(filled(batch)["loss"], plain(batch)["loss"])


@pytest.mark.parametrize("changed", ["pixels", "question", "supervised", "id", "teacher", "dtype"])
def test_what_has_changed_is_computed_again(tmp_path, changed):
    filled = a_distiller(cache_in(tmp_path))
    for batch in batches(range(6)):
        filled(batch)
    filled.teacher_cache.sync()
    data = ToyDataset(6)
    sample = data.samples[1] = {name: part.clone() for name, part in data.samples[1].items()}
    if changed == "pixels":
        sample["images"][0, 0, 0, 0] += 1e-3
    elif changed == "question":
        sample["input_ids"][2] += 1
    elif changed == "supervised":
        sample["labels"][-1] = -100
    elif changed == "id":
        sample["id"] = "another"
    cache = cache_in(tmp_path, teacher="u" if changed == "teacher" else "t",
                     dtype=torch.bfloat16 if changed == "dtype" else torch.float32)  # fmt: skip
    reader = a_distiller(cache)
    passes = Passes(reader)
    (batch,) = batches([0, 1], 2, data)
    assert float(reader(batch)["loss"]) == float(a_distiller()(batch)["loss"])
    assert passes.own == 1
    reader(batches([4, 5])[0])
    assert passes.own == (2 if changed in ("teacher", "dtype") else 1)


@pytest.mark.parametrize("damage", ["cut", "flipped", "rubbish"])
def test_a_damaged_file_is_noticed_and_made_good(tmp_path, damage, caplog):
    expected = torch.randn(5, 8)
    cache = cache_in(tmp_path)
    cache.add("ab" * 16, expected)
    cache.sync()
    (file,) = cache.folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        at = content.index(expected.numpy().tobytes()[:8])
        content[at] ^= 1
    file.unlink()
    file.write_bytes({"cut": content[:-7], "flipped": content, "rubbish": b"none"}[damage])
    reader = cache_in(tmp_path)
    assert reader.get("ab" * 16) is None
    assert "damaged" in caplog.text
    reader.add("ab" * 16, expected)
    reader.sync()
    assert torch.equal(reader.get("ab" * 16), expected)
    assert torch.equal(cache_in(tmp_path).get("ab" * 16), expected)


def _fill(folder, numbers):
    cache = cache_in(folder)
    for number in numbers:
        cache.add(f"{number:032x}", torch.full((2 + number % 3, 4), float(number)))
        if number % 5 == 0:
            cache.sync()
    cache.sync()


def test_two_processes_fill_one_cache(tmp_path):
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_fill, args=(tmp_path, numbers)) for numbers in (range(30), range(20, 50))]
    mine = cache_in(tmp_path)
    for one in both:
        one.start()
    for one in both:
        one.join(60)
        assert one.exitcode == 0
    assert mine.get(f"{7:032x}") is None
    mine.sync()
    for number in range(50):
        assert torch.equal(mine.get(f"{number:032x}"), torch.full((2 + number % 3, 4), float(number)))


def test_a_full_disk_ends_the_writing_and_not_the_training(tmp_path, monkeypatch, caplog):
    cache = cache_in(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr("tinyllava_switchkd.distill.teacher_cache.write_bytes", full)
    distiller = a_distiller(cache)
    (batch,) = batches([0, 1])
    distiller(batch)
    cache.sync()
    assert "No space left" in caplog.text
    assert float(distiller(batch)["loss"]) == float(a_distiller()(batch)["loss"])


def test_only_a_data_sets_own_samples_save_room(tmp_path, monkeypatch):
    """A cache may be full of another data set's."""

    class Data(ToyDataset):
        encode = ToyDataset.__getitem__

    collator = toy_collator(a_student())
    filled = a_distiller(cache_in(tmp_path))
    for batch in batches(range(6)):
        filled(batch)
    filled.teacher_cache.sync()
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1))
    assert "the disk has 0.0 MiB left" in tell_size(filled.teacher_cache, Data(6), collator, 48)
    with pytest.raises(ValueError, match="choose another folder"):
        tell_size(filled.teacher_cache, Data(3, seed=1), collator, 48)
    assert not collator.counts.any()


@pytest.mark.parametrize("method", ["llava_kd", "align_kd"])
def test_methods_that_read_more_are_refused(tmp_path, method):
    distiller = build_distiller(a_student(), tiny_llava(seed=2), method)
    with pytest.raises(ValueError, match=f"{method} also needs its"):
        distiller.teacher_cache = cache_in(tmp_path)
