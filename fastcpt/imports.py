"""No code through a configuration: `class_path: a.b` in a value makes jsonargparse import `a`, whoever wrote the file."""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")
NEEDED = {"argcomplete", "jsonargparse", "shtab", "yaml", *sys.stdlib_module_names}


class _Refused:
    """The first of the finders of modules: only what parsing itself may need goes on to the others."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in NEEDED:
            raise ImportError(f"{name}: a configuration imports nothing")
        return None


def without_imports(function: Callable[[], T]) -> T:
    """Calls `function`, which then can import the standard library, jsonargparse and yaml, and what is imported already."""
    sys.meta_path.insert(0, _Refused)
    try:
        return function()
    finally:
        sys.meta_path.remove(_Refused)
