"""Builds a checked `TrainConfig`, and an `ExpandConfig`, from gin files and command-line bindings.

This is the only module that imports gin. It clears gin's global state before and after each use. Imports no TensorFlow.
"""

import dataclasses
import json
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath
from typing import Any, TypeVar

import gin
from absl import flags
from gin import config_parser

from x3d_tf.config import PARTS, TrainConfig
from x3d_tf.errors import UserError, require
from x3d_tf.search.config import ExpandConfig
from x3d_tf.text import did_you_mean

flags.disclaim_key_flags()  # so that a command's --help lists --gin_file

_CONFIGURABLES = (*PARTS.values(), TrainConfig, ExpandConfig)
for _configurable in _CONFIGURABLES:
    gin.register(_configurable, module="x3d_tf")
_SETTINGS = {part.__name__: [field.name for field in dataclasses.fields(part)] for part in _CONFIGURABLES}
_MACRO = "gin.macro"
_T = TypeVar("_T")

_SYNTAX_ERRORS = {  # start of a message of gin -> rule to print instead
    "Expected newline": "a line must end after its value, and strings need quotes",
    "Unable to parse value": "a setting must have a value after '=', such as 20, True, None or a quoted string",
    "Couldn't parse statement": "a line must be a binding, such as Recipe.steps = 100",
    "Unexpected token": "a line must be a binding, such as Recipe.steps = 100",
    "Malformatted scope": "a setting must be named by its part and itself, such as Recipe.steps",
    "Invalid identifier": "a setting must be named by its part and itself, such as Recipe.steps",
    "Expected file path": "include must be followed by a path in quotes",
    "EOF in multi-line statement": "a bracket is not closed",
    "EOF in multi-line string": "a triple-quoted string is not closed",
    "unterminated": "a quoted string is not closed",
    "unhashable": "a dictionary key must be a number or a quoted string",
}

# Limits far above those of real configurations, which have about 1,000 characters and no nested values.
_TEXT_LIMIT = 32 * 1024  # characters in all files and bindings; a file counts each time it is included
_NESTING_LIMIT = 10  # depth of includes, and of brackets and macros
_VALUES_LIMIT = 10_000  # in all files and bindings; the values of a macro count each time it is used
_STRING_LIMIT = 4096  # characters
_INTEGER_BITS = 63


@dataclass(frozen=True)
class ParsedConfig:
    """A configuration and the gin text that it was built from.

    Attributes:
        config: the configuration.
        text: all bindings, as the text of a gin file.
        operative_text: all values in use, defaults included, as the text of a gin file.
        files: names of the given files, in their order: `gin/kinetics400/x3d_m.gin` for a recipe of this package,
            `./mine.gin` for any other file, whatever its folder. Included files are not listed.
        changed: names of the settings that bindings set after the files, such as `Recipe.steps`.
    """

    config: TrainConfig
    text: str
    operative_text: str
    files: tuple[str, ...]
    changed: tuple[str, ...]

    def recipe_json(self) -> str:
        """Returns the files and the changed settings as JSON, for the run folder; see `RunFolder.read_recipe`."""
        return json.dumps({"gin_files": self.files, "changed_settings": self.changed}, indent=1)


def define_flags(*, required: bool) -> None:
    """Defines --gin_file and --gin_bindings for a command."""
    text = "A .gin configuration file; repeat the flag for several. Later files override earlier ones."
    flags.DEFINE_multi_string("gin_file", None, f"{text} Required." if required else text)
    flags.DEFINE_multi_string(
        "gin_bindings",
        None,
        "A setting that overrides the files, such as 'Expansion.gamma_b=1.5'; repeat the flag for several.",
    )
    if required:
        flags.mark_flag_as_required("gin_file")


def parse(files: Sequence[str], bindings: Sequence[str] = ()) -> ParsedConfig:
    """Reads gin files and bindings; later ones override earlier ones.

    Configurations are data: they set settings and macros, and cannot execute code. All files and bindings are checked
    before the first value is set.

    Args:
        files: paths. A path that does not exist is looked up in the recipes of this package, where `gin/x3d_s.gin` and
            `x3d_s.gin` name the same file. Included files are looked up in the folder of the including file, then in
            the recipes, and nowhere else.
        bindings: lines of gin, such as `Expansion.gamma_b=1.5`.

    Raises:
        UserError: a missing file, a syntax error, an import, a recursive include or one outside the two folders, an
            unknown name, a value out of range or an unused binding. Bindings of `ExpandConfig` are unused here.
    """

    def build(of_command_line: Sequence[_Binding]) -> ParsedConfig:
        config = _train_config()
        _raise_unused()
        changed = tuple(dict.fromkeys(binding.name for binding in of_command_line))
        names = tuple(map(_recipe_name, files))
        return ParsedConfig(config, gin.config_str(), gin.operative_config_str(), names, changed)

    return _built(files, bindings, build)


def parse_expand(files: Sequence[str], bindings: Sequence[str] = ()) -> tuple[TrainConfig, ExpandConfig]:
    """Reads the settings of an expansion search, which also apply to its trainings, as `parse` does."""

    def build(_: Sequence[_Binding]) -> tuple[TrainConfig, ExpandConfig]:
        configs = _train_config(), gin.get_configurable(ExpandConfig)()
        _raise_unused()
        return configs

    return _built(files, bindings, build)


def _train_config() -> TrainConfig:
    """Returns the configuration that gin's bindings give."""
    parts = {name: gin.get_configurable(part)() for name, part in PARTS.items()}
    config: TrainConfig = gin.get_configurable(TrainConfig)(**parts)
    return config


def _built(files: Sequence[str], bindings: Sequence[str], build: "Callable[[Sequence[_Binding]], _T]") -> _T:
    """Returns what `build` returns for the bindings of the command line, while those of the files apply too."""
    reader = _Reader()
    for file in files:
        reader.read_file(find_recipe(file))
    of_files = len(reader.bindings)  # the files that the command line includes are not among `files`
    for line in bindings:
        reader.read_source(_Source(f"--gin_bindings={_shortened(line)}", line, None))
    _check_values(reader.bindings)
    gin.clear_config()
    try:
        for binding in reader.bindings:
            gin.bind_parameter(binding.key, binding.value)
        return build(reader.bindings[of_files:])
    except UserError as error:
        raise UserError(str(error).splitlines()[0]) from None  # gin appends lines about the call
    except RecursionError:
        raise UserError("a configuration must not refer to itself with @") from None
    except (ValueError, TypeError) as error:
        sources = ", ".join([*files, *map(_shortened, bindings)])
        raise UserError(f"{_join_lines(error)}{_hint(str(error))} (in {sources})") from error
    finally:
        gin.clear_config()


def find_recipe(file: str) -> Path:
    """Returns the path of a .gin file: the given path, or a recipe of this package.

    Raises:
        UserError: neither exists.
    """
    if _is_file(Path(file)):
        return Path(file)
    recipe = _recipes() / file.removeprefix("gin/")
    if _is_file(recipe):
        return recipe
    raise UserError(f"--gin_file={file}: no such file or recipe; available recipes: {_known_recipes(file)}")


def _recipe_name(file: str) -> str:
    """Returns the name of a file that `find_recipe` finds, from which recipes of this package can be told."""
    recipes, path = _recipes().resolve(), find_recipe(file).resolve()
    if path.is_relative_to(recipes):
        return f"gin/{path.relative_to(recipes).as_posix()}"
    return f"./{Path(file).name}"  # without folders, because model cards state it


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long
        return False


def _recipes() -> Path:
    package = Path(__file__).parent
    return next(folder for folder in (package / "recipes", package.parent / "gin") if folder.is_dir())


def _known_recipes(file: str) -> str:
    """Returns the recipes in the main folder, the folders of the others, and the names close to a missing file."""
    recipes = _recipes()
    names = sorted(f"gin/{path.relative_to(recipes).as_posix()}" for path in recipes.rglob("*.gin"))
    main = [name for name in names if name.count("/") == 1]
    folders = sorted({f"{name.rpartition('/')[0]}/" for name in names if name not in main})
    hint = did_you_mean(file[:200], names)
    return f"{', '.join(main)}, and those in {', '.join(folders)}" + (f"; {hint}" if hint else "")


@dataclass(frozen=True)
class _Source:
    """Gin text from a file or from the command line.

    Attributes:
        name: name of the file, or the command-line flag, for messages.
        content: the text.
        folder: folder of the file, where included files are looked up first; None for the command line.
    """

    name: str
    content: str
    folder: Path | None

    def place(self, line: int) -> str:
        """Returns the position of a line, for messages."""
        return self.name if self.folder is None else f"{self.name}, line {line}"


@dataclass(frozen=True)
class _Binding:
    """A setting or macro and its value.

    Attributes:
        key: (scope, configurable, parameter), as in gin.
        value: literals, macros and references to this package's configurables.
        place: file and line, or the command-line flag, for messages.
    """

    key: tuple[str, str, str]
    value: Any
    place: str

    @property
    def name(self) -> str:
        """Name of the setting, such as `Recipe.steps`, or of the macro, such as `%steps`."""
        scope, part, setting = self.key
        return f"%{scope}" if part == _MACRO else f"{part.removeprefix('x3d_tf.')}.{setting}"


class _Reader:
    """Collects the bindings of files, of the files that they include, and of the command line, without applying them.

    gin's own reader would execute imports and include files from any folder.

    Attributes:
        bindings: the bindings in the order in which they were read.
    """

    def __init__(self) -> None:
        self.bindings: list[_Binding] = []
        self._contents: dict[Path, str] = {}
        self._include_stack: list[Path] = []  # the file being read comes last
        self._size = 0

    def read_file(self, file: Path) -> None:
        """Collects the bindings of a file and of the files that it includes."""
        resolved = file.resolve()
        allowed = resolved not in self._include_stack and len(self._include_stack) <= _NESTING_LIMIT
        rule = f"not include itself, and includes must be nested at most {_NESTING_LIMIT} deep"
        require(allowed, str(file), rule, " > ".join(path.name for path in (*self._include_stack, resolved)))
        if resolved not in self._contents:
            self._contents[resolved] = _read_file(file)
        self._include_stack.append(resolved)
        self.read_source(_Source(str(file), self._contents[resolved], file.parent))
        self._include_stack.pop()

    def read_source(self, source: _Source) -> None:
        """Collects the bindings of a source and of the files that it includes."""
        self._size += len(source.content)
        rule = f"have at most {_TEXT_LIMIT} characters, included files counted"
        require(self._size <= _TEXT_LIMIT, f"{source.name}: the configuration", rule, self._size)
        for statement in _statements(source):
            place = source.place(statement.location.line_num)
            if isinstance(statement, config_parser.ImportStatement):
                rule = "a configuration must not import modules"
                raise UserError(f"{place}: {rule}, got {_shortened(statement.format())!r}; delete the line")
            if isinstance(statement, config_parser.IncludeStatement):
                self.read_file(_find_included(statement.filename, source.folder, place))
            elif isinstance(statement, config_parser.BlockDeclaration):
                _require_part(statement.selector, place)
            else:
                self.bindings.append(_binding(statement, place))


def _read_file(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            content = stream.read(_TEXT_LIMIT + 1)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    require(len(content) <= _TEXT_LIMIT, str(file), f"have at most {_TEXT_LIMIT} bytes", file.stat().st_size)
    zero = content.find(b"\0")
    require(zero < 0, f"{file}, line {content[:zero].count(10) + 1}", "be text without NUL bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line} must be UTF-8 text, got {content[error.start :][:1]!r}") from None


def _find_included(file: str, folder: Path | None, place: str) -> Path:
    """Returns the path of an included file: in the folder of the including file, or a recipe."""
    included = PurePath(file)
    inside = not (included.is_absolute() or ".." in included.parts or "\\" in file or "\0" in file)
    require(inside, f"{place}: the path of an included file", "be relative and must not contain '..'", _shortened(file))
    candidates = [(folder, file)] if folder else []
    for parent, name in [*candidates, (_recipes(), file.removeprefix("gin/"))]:
        if _is_file(parent / name):
            within = (parent / name).resolve().is_relative_to(parent.resolve())
            rule = "not be a symbolic link that leads out of its folder"
            require(within, f"{place}: the included file {parent / name}", rule, str((parent / name).resolve()))
            return parent / name
    where = f"neither in {folder} nor" if folder else "not"
    raise UserError(
        f"{place}: the included file {_shortened(file)!r} is {where} a recipe of this package: {_known_recipes(file)}"
    )


class _References(config_parser.ParserDelegate):
    """Resolves references in values; only macros and this package's configurables are allowed."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Any:
        scope, slash, selector = scoped_configurable_name.rpartition("/")
        part = _require_part(selector, f"@{_shortened(scoped_configurable_name)}")
        return gin.config.ConfigurableReference(f"{scope}{slash}{part}", evaluate)

    def macro(self, macro_name: str) -> Any:
        return gin.config.ConfigurableReference(f"{macro_name}/{_MACRO}", True)


def _statements(source: _Source) -> Iterator[Any]:
    """Yields the statements of a source, parsed by gin."""
    parser = None
    try:
        parser = config_parser.ConfigParser(source.content, _References())
        while statement := parser.parse_statement():
            yield statement
    except (ValueError, SyntaxError, TypeError, LookupError, NameError, StopIteration) as error:
        line = getattr(error, "lineno", None) or (parser.current_token.start[0] if parser else 1)
        raise UserError(f"{source.place(line)}: {_syntax_error(error)}") from None
    except tokenize.TokenError as error:
        message, (line, _) = error.args
        raise UserError(f"{source.place(line)}: {_reworded(message)}") from None
    except RecursionError:
        rule = f"brackets must be nested at most {_NESTING_LIMIT} deep"
        raise UserError(f"{source.place(parser.current_token.start[0] if parser else 1)}: {rule}") from None


def _syntax_error(error: Exception) -> str:
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    token = re.search(r"Failed to parse token '(.*)'", message, re.DOTALL)
    if token:
        hint = (
            "String values need their own quotes ('DatasetSpec.records=\"folder\"'), and booleans are True and False."
        )
        return f"{_shortened(token.group(1))!r} is not a valid value. {hint}"
    lines = message.splitlines()  # gin appends lines about the position
    return _reworded(_shortened(lines[0])) if lines else "the last statement is incomplete"


def _reworded(message: str) -> str:
    return next((rule for start, rule in _SYNTAX_ERRORS.items() if message.startswith(start)), message)


def _require_part(selector: str, place: str) -> str:
    """Returns the full name of a configurable of this package.

    Raises:
        UserError: the name belongs to no configurable of this package, but to gin or another package, or is unknown.
    """
    name = selector.removeprefix("x3d_tf.")
    _require_known(name, _SETTINGS, f"{place}: the group of settings")
    return f"x3d_tf.{name}"


def _binding(statement: Any, place: str) -> _Binding:
    scope, selector, setting, value, _ = statement
    if not setting:
        key = (f"{scope}/{selector}" if scope else selector, _MACRO, "value")
        return _Binding(key, value, place)
    part = _require_part(selector, place)
    known = _SETTINGS[part.removeprefix("x3d_tf.")]
    _require_known(setting, known, f"{place}: the setting of {selector}")
    return _Binding((scope, part, setting), value, place)


def _require_known(name: str, known: Iterable[str], what: str) -> None:
    """Raises `UserError` for an unknown name, with the close known names before the list of all."""
    names, name = list(known), name[:200]
    if name not in names:
        question = did_you_mean(name, names)
        hint = f"; {question}" if question else ""
        raise UserError(f"{what} must be one of {', '.join(names)}, got {name!r}{hint}")


def _check_values(bindings: Sequence[_Binding]) -> None:
    """Raises `UserError` for values that would take too much memory or time, and for undefined macros."""
    macros = {binding.key[0]: binding.value for binding in bindings if binding.key[1] == _MACRO}
    count = 0
    for binding in bindings:
        value = f"{binding.place}: a value"
        for part in _nested(binding.value, macros, binding.place):
            count += 1
            require(count <= _VALUES_LIMIT, f"{binding.place}: a configuration", f"have at most {_VALUES_LIMIT} values")
            if isinstance(part, str | bytes):
                require(len(part) <= _STRING_LIMIT, value, f"have at most {_STRING_LIMIT} characters", len(part))
            if isinstance(part, int):
                bits = part.bit_length()
                require(bits <= _INTEGER_BITS, value, f"have at most {_INTEGER_BITS} bits", bits)


def _nested(value: Any, macros: Mapping[str, Any], place: str, depth: int = 0) -> Iterator[Any]:
    """Yields a value and all nested values, with macros resolved."""
    rule = f"{place}: brackets and macros must be nested at most {_NESTING_LIMIT} deep, without recursion"
    if depth > _NESTING_LIMIT:
        raise UserError(rule)
    yield value
    within: Iterable[Any] = ()
    if isinstance(value, dict):
        within = chain(value, value.values())
    elif isinstance(value, list | tuple):
        within = value
    elif isinstance(value, gin.config.ConfigurableReference) and value.selector == _MACRO:
        name = "/".join(value.scopes)
        if name not in macros:
            raise UserError(f"{place}: the macro %{_shortened(name)} is not defined; add a line '{name} = ...'")
        within = (macros[name],)
    for part in within:
        yield from _nested(part, macros, place, depth + 1)


def _raise_unused() -> None:
    unused = sorted(set(_bindings(gin.config._CONFIG)) - set(_bindings(gin.config._OPERATIVE_CONFIG)))
    if unused and all(name.startswith(f"{ExpandConfig.__name__}.") for name in unused):
        raise UserError(
            f"unused bindings: {_shortened(', '.join(unused))}; only python -m x3d_tf.expand uses ExpandConfig"
        )
    if unused:
        raise UserError(
            f"unused bindings: {_shortened(', '.join(unused))}; scopes are not supported, so bind a setting by its own "
            "name ('Expansion.gamma_b=1.5'), and remove or use macros"
        )


def _bindings(config: dict[tuple[str, str], dict[str, object]]) -> Iterator[str]:
    for (scope, selector), values in config.items():
        if selector == "gin.macro":
            yield f"%{scope}"
            continue
        for parameter in values:
            yield f"{scope + '/' if scope else ''}{selector.removeprefix('x3d_tf.')}.{parameter}"


def _hint(message: str) -> str:
    """Returns advice for an error message of gin; empty if there is none."""
    if "missing 1 required positional argument: 'records'" in message:
        return " Give the gin file of a network first (--gin_file=gin/x3d_s.gin), or set DatasetSpec.records."
    return ""


def _shortened(text: str) -> str:
    """Returns text for a message, with control characters escaped and at most 200 characters."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _join_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
