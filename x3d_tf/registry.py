"""Finds objects by name, such as tasks and data sets: in the package, in other installed packages, and in plugins.

Imports no TensorFlow.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Generic, Protocol, TypeVar, cast

from x3d_tf.errors import UserError, first_line, require

_MODULE_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_plugins: dict[str, ModuleType] = {}


class Named(Protocol):
    """An object of a registry."""

    @property
    def name(self) -> str:
        """The name by which settings, files and flags refer to the object."""


_T = TypeVar("_T", bound=Named)


class Registry(Generic[_T]):
    """The objects of one kind, by name.

    Objects come from three sources: the modules of a package of x3d_tf, and plugins, each of which lists its objects in
    a module attribute; and the entry points of installed packages, each of which names one object.

    Args:
        kind: noun for messages, such as "task".
        package: package whose modules list objects, such as "x3d_tf.tasks"; also the group of the entry points.
        attribute: module attribute that lists the objects, such as "TASKS".
    """

    def __init__(self, kind: str, package: str, attribute: str) -> None:
        self._kind, self._package, self._attribute = kind, package, attribute

    def names(self) -> tuple[str, ...]:
        """Returns all names, in alphabetical order."""
        return tuple(sorted(self._loaders()))

    def get(self, name: str) -> _T:
        """Returns an object.

        Raises:
            UserError: no object has the name (the message lists the names), two objects have the same name, or the
                object of an entry point cannot be imported or has another name than the entry point.
        """
        loaders = self._loaders()
        if name not in loaders:
            raise UserError(
                f"there is no {self._kind} {name!r}: the names are {', '.join(sorted(loaders))}. "
                "If a module of your own defines it, load the module with --plugin=MODULE"
            )
        return loaders[name]()

    def _loaders(self) -> dict[str, Callable[[], _T]]:
        """Returns a function for each name that returns the object, so that unused entry points are not imported."""
        loaders: dict[str, Callable[[], _T]] = {}
        for name, loader in self._found():
            require(name not in loaders, f"the name of a {self._kind}", "be unique", name)
            loaders[name] = loader
        return loaders

    def _found(self) -> Iterator[tuple[str, Callable[[], _T]]]:
        folders = importlib.import_module(self._package).__path__
        modules = [importlib.import_module(f"{self._package}.{info.name}") for info in pkgutil.iter_modules(folders)]
        for module in (*modules, *_plugins.values()):
            for item in getattr(module, self._attribute, ()):
                yield item.name, lambda item=item: item  # type: ignore[misc]
        for point in entry_points(group=self._package):
            yield point.name, lambda point=point: self._load(point)  # type: ignore[misc]

    def _load(self, point: EntryPoint) -> _T:
        """Returns the object of an entry point after checking that both have the same name."""
        where = f"the {self._kind} {point.value} of an installed package"
        try:
            item = point.load()
        except Exception as error:  # a package can raise anything
            raise UserError(f"{where} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
        name = getattr(item, "name", None)
        require(name == point.name, where, f"have the name of its entry point, {point.name!r}", name)
        return cast(_T, item)


def plugins() -> tuple[str, ...]:
    """Returns the names of the loaded plugins, for worker processes to load."""
    return tuple(_plugins)


def load_plugin(name: str) -> None:
    """Imports a module whose objects all registries then find. Importing executes the module.

    Args:
        name: dotted name of a module that Python can import, for example from the working folder.

    Raises:
        UserError: the name is not a module name, or the module does not exist or fails to import.
    """
    require(bool(_MODULE_NAME.fullmatch(name)), "--plugin", "be the name of a Python module, such as my_task", name)
    try:
        _plugins[name] = importlib.import_module(name)
    except Exception as error:  # a plugin can raise anything
        raise UserError(f"--plugin={name} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
