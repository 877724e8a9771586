"""Tell transformers' Auto classes of a model, without importing transformers (or torch) for those who need neither.

``import tinyllava_switchkd`` must make ``AutoConfig.from_pretrained(checkpoint)`` work, but also stay light, for
scoring starts without torch. So the configuration's module, which registers itself, is imported once transformers'
registry of configurations is, by whomever. The model's module is imported when a configuration is read from a file:
nothing else tells that a model may be asked for next. The package's ``__init__`` says which modules these are.
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
    """Have a configuration registered now if transformers' registry is imported already, else as soon as it is.

    Args:
        configuration: name of the module that registers the configuration's class when it is imported.
        model: name of the module that registers the model's class when it is imported.
    """
    _modules.update(configuration=configuration, model=model)
    if REGISTRY in sys.modules:
        _register_configuration()
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


def register_model() -> None:
    """Have the model registered; a configuration calls this when it is read from a file."""
    importlib.import_module(_modules["model"])


def _register_configuration() -> None:
    importlib.import_module(_modules["configuration"])


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
        _register_configuration()
