"""The yaml of a recipe: read, refusing what yaml would take silently, and written."""

from collections.abc import Mapping
from typing import Any

import yaml

NESTED = 8  # levels of a yaml file; a recipe has two


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which yaml would take the last, and what unfolds."""

    level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As in yaml; refuses deep nesting, and an alias of a list or a map."""
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        self.level += 1
        if self.level > NESTED:
            raise yaml.YAMLError(f"it is nested more than {NESTED} levels deep")
        node = super().compose_node(parent, index)
        self.level -= 1
        if alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.YAMLError(f"*{alias.anchor} repeats a list or a map; a recipe has neither")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """As in yaml; refuses a key that is given twice."""
        keys = [key.value for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(f"{', '.join(twice)} is given twice")
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The value of a yaml text.

    Raises:
        ValueError: it is not yaml, gives a key twice, or is nested deeply.
    """
    try:
        return yaml.load(text, StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def write_yaml(settings: Mapping[str, Any]) -> str:
    """The yaml text of settings, in their order."""
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
