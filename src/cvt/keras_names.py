"""Registers the classes of `cvt.keras` by name, so that `import cvt` suffices to load .keras files.

Keras looks up a custom class by its registered name, but `import cvt` imports neither Keras nor the
module that registers it. Stand-ins are therefore registered when Keras is imported.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

SAVED = ("TFCvtModel", "TFCvtForImageClassification", "ClassificationLoss", "Accuracy")


def register(keras: ModuleType) -> None:
    """Register a stand-in for each class that is not registered yet."""
    for name in SAVED:
        keras.saving.get_custom_objects().setdefault(f"cvt>{name}", stand_in(name))


def stand_in(name: str) -> type:
    """Create a class whose `from_config` imports the real class and creates a saved object."""

    def from_config(cls: type, config: dict[str, Any]) -> Any:
        return getattr(import_module("cvt.keras"), name).from_config(config)

    return type(name, (), {"from_config": classmethod(from_config)})


class KerasImportHook:
    """Calls `register` when Keras is first imported.

    It is no `MetaPathFinder`, which would be slower to import than all of `cvt`.
    """

    def __init__(self) -> None:
        self.found = False

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Return the usual spec of Keras, once, with a loader that registers the stand-ins."""
        if name != "keras" or self.found:
            return None
        self.found = True
        spec = find_spec("keras")
        if spec is not None and spec.loader is not None:
            exec_module = spec.loader.exec_module

            def exec_module_and_register(module: ModuleType) -> None:
                exec_module(module)
                register(module)

            spec.loader.exec_module = exec_module_and_register  # type: ignore[method-assign]
        return spec


def register_with_keras() -> None:
    """Register now, or when Keras is imported."""
    if "keras" in sys.modules:
        register(sys.modules["keras"])
    else:
        sys.meta_path.insert(0, KerasImportHook())
