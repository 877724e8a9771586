"""The lmms-eval plugin, with the real package if it is installed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.eval.miniature import picture, write_checkpoint
from tinyllava_switchkd.eval import lmms_plugin
from tinyllava_switchkd.eval.generate import Answerer

lmms_eval = pytest.importorskip(
    "lmms_eval", reason="lmms-eval is not installed: pip install 'tinyllava_switchkd[lmms]' to test the plugin"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-vlm")


@pytest.fixture(scope="module")
def answerer(checkpoint):
    return Answerer.from_pretrained(checkpoint, device="cpu")


@pytest.fixture
def model(checkpoint):
    from tinyllava_switchkd.eval.lmms_model import TinyLlavaSwitchKD

    return TinyLlavaSwitchKD(checkpoint, device="cpu", batch_size=4)


@pytest.fixture
def images(tmp_path):
    from PIL import Image

    found = []
    for number in range(6):
        picture(tmp_path / f"{number}.png", number)
        with Image.open(tmp_path / f"{number}.png") as image:
            found.append(image.copy())
    return found


def requests_of(model, documents, kind="generate_until"):
    """Requests as a task makes them; a document is (context, generation kwargs or target, pictures)."""
    from lmms_eval.api.instance import Instance

    model.task_dict["t"] = {"test": documents}
    return [
        Instance(
            request_type=kind,
            arguments=(context, second, lambda document: document[2], number, "t", "test"),
            idx=0,
            metadata={"task": "t", "doc_id": number, "repeats": 1},
        )
        for number, (context, second, _) in enumerate(documents)
    ]


def alone(answerer, context, images, limit):
    """The answer to a single question."""
    visual = (
        torch.cat([answerer.encode_images(answerer.pixels_of(image)[None]) for image in images]) if images else None
    )
    return answerer.answer([answerer.prompt_ids(context, len(images))], [visual], limit)[0]


def test_lmms_eval_finds_the_model():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    for manifest in lmms_plugin.manifests():
        registry.register_manifest(manifest)
    assert registry.resolve("tinyllava_switchkd").model_type == "simple"
    found = registry.get_model_class("switchkd")  # checks base class and is_simple, too
    assert found.__name__ == "TinyLlavaSwitchKD"


def test_batches_answer_like_single_questions(model, answerer, images):
    short, long = {"max_new_tokens": 6, "temperature": 0}, {"max_new_tokens": 12, "do_sample": False, "top_p": 1.0}
    documents = [
        ("what is it?", short, [images[0]]),
        ("a text-only question about nothing at all?", short, []),
        ("what is it, seen from the left and from the right?", long, [images[1], images[2]]),
        ("what?", long, None),
        *((f"how many {'very ' * number}red things are there?", short, [image]) for number, image in enumerate(images)),
        ("<image>\nwhat is it?", short, [images[0]]),  # a context that marks the place of its picture
    ]
    texts = model.generate_until(requests_of(model, documents))
    expected = [
        alone(answerer, context.replace("<image>\n", ""), pictures or [], settings["max_new_tokens"])
        for context, settings, pictures in documents
    ]
    assert texts == expected
    assert len(set(texts)) > 4
    assert texts[0] == texts[-1]


def test_stop_strings_and_sampling(model, images):
    asked = [("what is " + "very " * number, {"max_new_tokens": 24}, [images[0]]) for number in range(12)]
    texts = model.generate_until(requests_of(model, asked))
    whole = max(texts, key=len)
    context, stop = asked[texts.index(whole)][0], whole[2]
    settings = {"max_new_tokens": 24, "until": [stop, "\n\n"]}
    assert model.generate_until(requests_of(model, [(context, settings, [images[0]])])) == [
        whole[: whole.index(stop)].strip()
    ]
    sampled = {"max_new_tokens": 24, "do_sample": True, "temperature": 5.0}
    torch.manual_seed(0)
    several = model.generate_until(requests_of(model, [(context, sampled, [images[0]])] * 6))
    assert len(set(several)) > 1


def test_loss_of_a_target(model, answerer, images):
    greedy = alone(answerer, "what is it?", [images[0]], 64)
    documents = [("what is it?", greedy, [images[0]]), ("what is it?", "zebra", [images[0]]), ("why?", "so", [])]
    results = model.loglikelihood(requests_of(model, documents, "loglikelihood"))
    losses, is_greedy = zip(*results, strict=True)
    assert losses[0] < losses[1]
    assert not is_greedy[1]
    assert not is_greedy[2]


def test_what_the_model_cannot_see(model):
    with pytest.raises(ValueError, match=r"The task t shows a str \(document 0\), but this model sees only pictures"):
        model.generate_until(requests_of(model, [("what?", {"max_new_tokens": 2}, ["a/video.mp4"])]))
    with pytest.raises(NotImplementedError, match="Tasks of several rounds"):
        model.generate_until_multi_round([])


def test_a_task_of_lmms_eval_from_end_to_end(checkpoint, answerer, images, tmp_path):
    """Its POPE, on pictures of our own."""
    import datasets
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    words = ("cat", "very large dinosaur", "cup")
    rows = [
        {"id": str(number), "question_id": str(number), "question": f"Is there a {word} in the image?", "answer": "yes"}
        | {"image_source": f"{number}", "image": image, "category": "random"}
        for number, (image, word) in enumerate((image, word) for image in images for word in words)
    ]
    features = datasets.Features(
        {key: datasets.Image() if key == "image" else datasets.Value("string") for key in rows[0]}
    )
    table = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "data")
    tasks, original = tmp_path / "tasks", Path(lmms_eval.__file__).parent / "tasks" / "pope"
    tasks.mkdir()
    shutil.copy(original / "utils.py", tasks)
    text = (original / "pope.yaml").read_text(encoding="utf-8")
    text = text.replace("lmms-lab-encoder/POPE", str(tmp_path / "data")).replace(
        "  token: True", "  load_from_disk: true"
    )
    text = text.replace('task: "pope"', "task: our_pope").replace("max_new_tokens: 128", "max_new_tokens: 6")
    (tasks / "our_pope.yaml").write_text(text, encoding="utf-8")

    results = simple_evaluate(
        model="tinyllava_switchkd",
        model_args=f"pretrained={checkpoint}",
        tasks=["our_pope"],
        task_manager=TaskManager(include_path=str(tasks)),
        batch_size=4,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
    )
    assert "pope_f1_score,none" in results["results"]["our_pope"]
    samples = sorted(results["samples"]["our_pope"], key=lambda sample: sample["doc_id"])
    suffix = "\nAnswer the question using a single word or phrase."
    expected = [alone(answerer, row["question"] + suffix, [row["image"]], 6) for row in rows]
    found = [sample["filtered_resps"] for sample in samples]
    assert [text[0] if isinstance(text, list) else text for text in found] == expected
