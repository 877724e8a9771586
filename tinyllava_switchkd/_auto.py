"""Register a model with transformers' Auto classes without importing transformers or torch up front.

``import tinyllava_switchkd`` must make ``AutoConfig.from_pretrained(checkpoint)`` work, but must not import torch,
which scoring does without. So the configuration's module, which registers itself, is imported right after transformers'
registry of configurations, whoever imports that. The model's module is imported when a configuration is read from a
file, because there is no other sign that the model may be needed next. The package's ``__init__`` names both modules.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

REGISTRY = "transformers.models.auto.configuration_auto"

_modules = {"configuration": "", "model": ""}


def install(configuration: str, model: str) -> None:
    """Register a configuration now if transformers' registry is already imported, otherwise as soon as it is.

    Args:
        configuration: name of the module that registers the configuration class on import.
        model: name of the module that registers the model class on import.
    """
    _modules.update(configuration=configuration, model=model)
    if REGISTRY in sys.modules:
        _register_configuration()
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


def register_model() -> None:
    """Register the model; called when a configuration is read from a file."""
    importlib.import_module(_modules["model"])


def _register_configuration() -> None:
    importlib.import_module(_modules["configuration"])


class _RegistryFinder(importlib.abc.MetaPathFinder):
    """Finds only transformers' registry, makes its loader register afterwards, and removes itself."""

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
        # Restore the module's own loader, which inspect and importlib.resources ask for sources and resources.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        _register_configuration()
