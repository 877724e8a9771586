"""The page's image: a file that a person uploaded, handed on unopened."""

from __future__ import annotations

from abc import ABCMeta
from pathlib import Path
from typing import Any

import gradio as gr


class _WithoutStub(type(gr.Image)):
    """Makes a component without the .pyi file that Gradio's own metaclass writes beside the source."""

    def __new__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> type:
        return ABCMeta.__new__(cls, name, bases, attributes)


class UploadedImage(gr.Image, metaclass=_WithoutStub):
    """Gives handlers the path of an uploaded file, and takes nothing else.

    Gradio's image would decode the file first, without our limits, and fetch an address that a client sends in place
    of a file. A class rather than two replaced methods: Gradio makes the component anew, by its class, whenever a
    handler leaves it as it is.
    """

    is_template = True  # drawn by the browser's code for gr.Image

    def preprocess(self, payload: Any) -> str | None:
        return None if payload is None else payload.path

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        if str(url_or_file_path).startswith(("http://", "https://")):
            raise gr.Error("Images are uploaded, not fetched from an address.")
        return await super().async_move_resource_to_block_cache(url_or_file_path)
