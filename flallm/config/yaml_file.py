"""YAML files, in which a field has no other value than what is written."""

from __future__ import annotations

import re
import typing
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml

from flallm.config.fields import type_of
from flallm.utils import UserError

DATE = "tag:yaml.org,2002:timestamp"
# What YAML can take a text without quotes for.
READ_AS_OTHER = (
    "tag:yaml.org,2002:bool",
    "tag:yaml.org,2002:int",
    "tag:yaml.org,2002:float",
    DATE,
)


class _Loader(yaml.SafeLoader):
    """Refuses a repeated key, of which YAML's readers silently drop the first."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        # Other nodes may be tagged as mappings; the reader itself refuses them.
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                problem = f"{key.value!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_constructor(DATE, lambda loader, node: node.value)  # no field is a date


def read_mapping(path: Path, hints: dict[str, Any]) -> dict:
    """The content of a YAML file that holds a mapping.

    hints: the types of the fields it may have, by name. Raises UserError for a file that cannot
    be read, or where YAML gives one of these fields another value than is written.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        content = loader.construct_document(node) if node else None
    # ValueError: no UTF-8, or a number of thousands of digits.
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as YAML: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no recipe: sections such as `data:` were expected")
    _Checker(loader, path).check_mapping(node, hints)
    return content


class _Checker:
    """Compares what a file says with what YAML reads."""

    def __init__(self, loader: _Loader, path: Path):
        self.loader, self.path = loader, path

    def check_mapping(
        self, node: yaml.MappingNode, hints: dict[str, Any], prefix: str = ""
    ) -> None:
        """prefix: the dotted name of the mapping, with a dot at its end."""
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in hints:
                self._check_field(value, type_of(hints[key.value]), prefix + key.value)

    def _check_field(self, node: yaml.Node, kind: Any, name: str) -> None:
        if is_dataclass(kind) and isinstance(node, yaml.MappingNode):
            self.check_mapping(node, typing.get_type_hints(kind), f"{name}.")
        elif typing.get_origin(kind) is tuple:
            for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
                self._check_field(item, typing.get_args(kind)[0], name)
        elif isinstance(node, yaml.ScalarNode) and node.tag in READ_AS_OTHER:
            self._check_scalar(node, kind, name)

    def _check_scalar(self, node: yaml.ScalarNode, kind: Any, name: str) -> None:
        """Refuses text that is read as something else (no as false, 12:30 as 750), and a number
        that is read as another one (010 as 8)."""
        text, value = node.value, self.loader.construct_object(node)
        read_as = str(value)
        if isinstance(value, bool):
            read_as = read_as.lower()
        elif node.tag == DATE:
            read_as = "a date"
        problem = f"{self.path}: {name}: YAML reads {text} as {read_as}"
        if kind is str and (isinstance(value, bool) or read_as != text):
            raise UserError(f'{problem}; write it in quotes: {name.rpartition(".")[2]}: "{text}"')
        if kind in (int, float) and re.search(r":|^[-+]?0[0-7_]+$", text):
            advice = "write the number that is meant, without a colon and without 0 before it"
            raise UserError(f"{problem}; {advice}")
