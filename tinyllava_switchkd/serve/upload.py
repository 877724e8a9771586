"""The page's image: a file that a person uploaded, handed on unopened; and a page that takes no other files."""

from __future__ import annotations

from abc import ABCMeta
from pathlib import Path

import gradio as gr
from gradio.blocks import BlockFunction
from gradio.component_meta import ComponentMeta
from gradio.data_classes import ImageData

from tinyllava_switchkd.model.trust import objects_in
from tinyllava_switchkd.serve.examples import EXAMPLES, FOLDER

REFUSED = "Images are uploaded, not fetched from elsewhere: this one is no upload of this page. Please upload it."
"""The one answer to whatever names a file that was not uploaded here, whether there is such a file or not."""


class GuardedBlocks(gr.Blocks):
    """A page whose requests may name no file but an upload of its own, and only as an image.

    Gradio looks at files that say so of themselves (``meta``): it copies what lies in its folder and fetches addresses,
    for a text box as well as for an image. What does not say so reaches the component as it is. So requests are looked
    at before Gradio does, and `own_file` is asked again where an image is opened.
    """

    def validate_inputs(self, block_fn: BlockFunction, inputs: list[object]) -> None:
        super().validate_inputs(block_fn, inputs)
        for block, value in zip(block_fn.inputs, inputs, strict=False):
            if block.stateful:
                continue  # the server's own; what a client sends in its place is never read
            if isinstance(block, UploadedImage):
                if value is not None and self.own_file(_path_of(value)) is None:
                    raise gr.Error(REFUSED, print_exception=False)
            elif any(True for _ in objects_in(value)):
                raise gr.Error("A field of the page holds text or a number, no object.", print_exception=False)

    def own_file(self, path: str | None) -> str | None:
        """The file behind what a client calls an image: an upload of this server, or one of its examples; else None.

        Nothing but these is looked for on the disk, so that no answer tells whether a file is there.
        """
        if path is None:
            return None
        if path in self.examples:
            return self.examples[path]
        if path in self.upload_file_set and Path(path).is_file() and not Path(path).is_symlink():
            return path
        return None

    @property
    def examples(self) -> dict[str, str]:
        """Gradio's copies of the examples (the page shows and sends these) -> the files themselves."""
        gallery = next(block for block in self.blocks.values() if isinstance(block, gr.Gallery))
        copies = [item["image"]["path"] for item in gallery.value or ()]
        return {copy: str(FOLDER / name) for copy, (name, _) in zip(copies, EXAMPLES, strict=True)}


def _path_of(value: object) -> str | None:
    """The path in what a client says of an image; None where it is not of that form."""
    path = value.get("path") if isinstance(value, dict) else None
    return path if isinstance(path, str) else None


class _WithoutStub(ComponentMeta):
    """Makes a component without the .pyi file that Gradio's own metaclass writes beside the source."""

    def __new__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, object]) -> type:
        return ABCMeta.__new__(cls, name, bases, attributes)


class UploadedImage(gr.Image, metaclass=_WithoutStub):
    """Gives handlers the path that a client sent, and touches no file.

    Gradio's image would decode the file first, without our limits, and fetch an address that a client sends in place
    of a file. A class rather than two replaced methods: Gradio makes the component anew, by its class, whenever a
    handler leaves it as it is.
    """

    is_template = True  # drawn by the browser's code for gr.Image

    def preprocess(self, payload: ImageData | None) -> str | None:
        return None if payload is None else payload.path

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        return None if url_or_file_path is None else str(url_or_file_path)  # neither fetched nor copied
