"""An image component that passes on uploads unopened, and a page that accepts no other files."""

from __future__ import annotations

from abc import ABCMeta
from pathlib import Path

import gradio as gr
from gradio.blocks import BlockFunction
from gradio.component_meta import ComponentMeta
from gradio.data_classes import ImageData

from tinyllava_switchkd.model.trust import objects_in
from tinyllava_switchkd.serve.examples import EXAMPLES, FOLDER

REFUSED = "Images are uploaded, not fetched from elsewhere: this one was not uploaded on this page. Please upload it."
"""The answer to every request for a file that was not uploaded here, whether the file exists or not."""


class GuardedBlocks(gr.Blocks):
    """A page whose requests may name only its own uploads, and only as an image.

    Gradio processes any input marked as a file (``meta``), in a text box as well as in an image: it copies the file if
    it is in Gradio's folder, and fetches it if it is a URL. Input without the mark reaches the component unchanged. So
    requests are checked before Gradio processes them, and `own_file` checks again when an image is opened.
    """

    def validate_inputs(self, block_fn: BlockFunction, inputs: list[object]) -> None:
        super().validate_inputs(block_fn, inputs)
        for block, value in zip(block_fn.inputs, inputs, strict=False):
            if block.stateful:
                continue  # kept by the server; a value sent by the client is never read
            if isinstance(block, UploadedImage):
                if value is not None and self.own_file(_path_of(value)) is None:
                    raise gr.Error(REFUSED, print_exception=False)
            elif any(True for _ in objects_in(value)):
                raise gr.Error("A field of the page takes text or a number, not an object.", print_exception=False)

    def own_file(self, path: str | None) -> str | None:
        """The file of an image named by a client: an upload of this server or an example; otherwise None.

        No other path is looked up on the disk, so that the answer does not reveal whether a file exists.
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
        """Gradio's copies of the examples, which the page shows and sends -> the original files."""
        gallery = next(block for block in self.blocks.values() if isinstance(block, gr.Gallery))
        copies = [item["image"]["path"] for item in gallery.value or ()]
        return {copy: str(FOLDER / name) for copy, (name, _) in zip(copies, EXAMPLES, strict=True)}


def _path_of(value: object) -> str | None:
    """The path in a client's description of an image; None if it has none."""
    path = value.get("path") if isinstance(value, dict) else None
    return path if isinstance(path, str) else None


class _WithoutStub(ComponentMeta):
    """Creates a component without the .pyi file that Gradio's metaclass writes beside the source."""

    def __new__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, object]) -> type:
        return ABCMeta.__new__(cls, name, bases, attributes)


class UploadedImage(gr.Image, metaclass=_WithoutStub):
    """An image component that gives handlers the client's path and touches no file.

    gr.Image would decode the file first, without our limits, and fetch a URL sent in place of a file. This must be a
    class, not an instance with two methods replaced, because Gradio recreates the component from its class.
    """

    is_template = True  # the browser uses its code for gr.Image

    def preprocess(self, payload: ImageData | None) -> str | None:
        return None if payload is None else payload.path

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        return None if url_or_file_path is None else str(url_or_file_path)  # neither fetched nor copied
