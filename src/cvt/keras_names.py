"""The classes of `cvt.keras` by name, so that a .keras file opens after `import cvt` alone.

Keras finds a class of others by the name that its module registered, and `import cvt` imports
neither Keras nor that module. So stand-ins are registered as soon as Keras is there.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

SAVED = ("TFCvtModel", "TFCvtForImageClassification", "ClassificationLoss", "Accuracy")


def register(keras: ModuleType) -> None:
    """Register a stand-in for each class that is not registered itself."""
    for name in SAVED:
        keras.saving.get_custom_objects().setdefault(f"cvt>{name}", stand_in(name))


def stand_in(name: str) -> type:
    """What a saved object is made by: it imports the class of that name."""

    def from_config(cls: type, config: dict[str, Any]) -> Any:
        return getattr(import_module("cvt.keras"), name).from_config(config)

    return type(name, (), {"from_config": classmethod(from_config)})


class BehindKeras(MetaPathFinder):
    """Calls `register` when Keras is first imported."""

    def __init__(self) -> None:
        self.found = False

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """That of Keras, once; it is found as ever."""
        if name != "keras" or self.found:
            return None
        self.found = True
        spec = find_spec("keras")
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_with_keras() -> None:
    """Register now, or when Keras is imported."""
    if "keras" in sys.modules:
        register(sys.modules["keras"])
    else:
        sys.meta_path.insert(0, BehindKeras())
