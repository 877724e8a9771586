"""Tell transformers' Auto classes of TinyLLaVA, without importing transformers (or torch) for those who need neither.

``import tinyllava_switchkd`` must make ``AutoConfig.from_pretrained(checkpoint)`` work, but also stay light, for
scoring starts without torch. So the registration waits until transformers' registry of configurations is imported, by
whomever; the configuration, when one is read, brings in the model class.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

REGISTRY = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Register `TinyLlavaConfig`: importing its module does so."""
    importlib.import_module("tinyllava_switchkd.model.configuration")


def install() -> None:
    """Register now if transformers' registry is imported already, else as soon as it is."""
    if REGISTRY in sys.modules:
        register()
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


class _RegistryFinder(importlib.abc.MetaPathFinder):
    """Finds nothing but the registry's module, whose loader it lets register afterwards; then it is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(importlib.abc.Loader):
    """Loads a module as its own loader would, then registers."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        # The module's own loader from here on, for whoever asks it for sources or resources.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        register()
