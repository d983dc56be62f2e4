"""Finds objects by name, such as tasks and data sets: in the package, in other installed packages, and in plugins.

Imports no TensorFlow.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Generic, Protocol, TypeVar, cast

from x3d_tf.errors import UserError, first_line, require
from x3d_tf.text import plural

_MODULE_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_plugins: dict[str, ModuleType] = {}
PLUGIN_ATTRIBUTES = ("TASKS", "DATASETS")  # a plugin has at least one


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
        protocols: the Protocols of which an object must have all members of one.
    """

    def __init__(self, kind: str, package: str, attribute: str, protocols: Sequence[type] = (Named,)) -> None:
        self._kind, self._package, self._attribute, self._protocols = kind, package, attribute, protocols

    def names(self) -> tuple[str, ...]:
        """Returns all names, in alphabetical order."""
        return tuple(sorted(self._loaders()))

    def get(self, name: str) -> _T:
        """Returns an object.

        Raises:
            UserError: no object has the name (the message lists the names), several have it (the message lists where
                they are defined), a module lists something else, or the object of an entry point cannot be imported or
                has another name than the entry point.
        """
        loaders = self._loaders()
        if name not in loaders:
            raise UserError(
                f"there is no {self._kind} {name!r}: the names are {', '.join(sorted(loaders))}. "
                "If a module of your own defines it, load the module with --plugin=MODULE"
            )
        (origin, load), *others = loaders[name]
        if others:
            origins = ", ".join([origin, *(other for other, _ in others)])
            raise UserError(f"the {self._kind} {name!r} must be defined once, but several modules define it: {origins}")
        return load()

    def _loaders(self) -> dict[str, list[tuple[str, Callable[[], _T]]]]:
        """Returns, for each name, where it is defined, with a function that returns the object.

        Unused entry points are thus not imported.
        """
        loaders: dict[str, list[tuple[str, Callable[[], _T]]]] = {}
        for name, origin, loader in self._found():
            loaders.setdefault(name, []).append((origin, loader))
        return loaders

    def _found(self) -> Iterator[tuple[str, str, Callable[[], _T]]]:
        folders = importlib.import_module(self._package).__path__
        modules = [importlib.import_module(f"{self._package}.{info.name}") for info in pkgutil.iter_modules(folders)]
        for module in (*modules, *_plugins.values()):
            listed, where = getattr(module, self._attribute, ()), f"{module.__name__}.{self._attribute}"
            require(isinstance(listed, tuple | list), where, f"be a tuple of {plural(self._kind)}", listed)
            for item in listed:
                self._check(item, f"an object in {where}")
                yield item.name, module.__name__, lambda item=item: item  # type: ignore[misc]
        for point in entry_points(group=self._package):
            package = point.dist.name if point.dist else "an installed package"
            origin = f"{point.value} of {package}"
            yield point.name, origin, lambda point=point: self._load(point)  # type: ignore[misc]

    def _check(self, item: object, where: str) -> None:
        """Raises `UserError` unless an object is a complete one of this kind."""
        require(not isinstance(item, type), where, "be an object, not a class", item)
        missing = min((_missing(item, protocol) for protocol in self._protocols), key=lambda names: len(names))
        require(not missing, where, f"be a {self._kind}, which has {', '.join(missing)}", item)

    def _load(self, point: EntryPoint) -> _T:
        """Returns the object of an entry point after checking that both have the same name."""
        where = f"the {self._kind} {point.value} of an installed package"
        try:
            item = point.load()
        except (Exception, SystemExit) as error:  # a package can raise anything
            raise UserError(f"{where} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
        name = getattr(item, "name", None)
        require(name == point.name, where, f"have the name of its entry point, {point.name!r}", name)
        self._check(item, where)
        return cast(_T, item)


def plugins() -> tuple[str, ...]:
    """Returns the names of the loaded plugins, for worker processes to load."""
    return tuple(_plugins)


def _missing(item: object, protocol: type) -> list[str]:
    """Returns the members of a Protocol that an object lacks."""
    return [name for name in dir(protocol) if not name.startswith("_") and not hasattr(item, name)]


def load_plugin(name: str) -> None:
    """Imports a module whose objects all registries then find. Importing executes the module.

    Args:
        name: dotted name of a module that Python can import, for example from the working folder.

    Raises:
        UserError: the name is not a module name, the module does not exist or fails to import, or it lists no objects.
    """
    if name.endswith(".py"):
        raise UserError(f"--plugin must be the name of a module, not of its file: --plugin={Path(name).stem}")
    require(bool(_MODULE_NAME.fullmatch(name)), "--plugin", "be the name of a Python module, such as my_task", name)
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a plugin can raise anything
        raise UserError(f"--plugin={name} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
    if not any(hasattr(module, attribute) for attribute in PLUGIN_ATTRIBUTES):
        file = getattr(module, "__file__", None) or "built in"
        raise UserError(f"--plugin={name} ({file}) must list its objects in {' or '.join(PLUGIN_ATTRIBUTES)}")
    _plugins[name] = module
