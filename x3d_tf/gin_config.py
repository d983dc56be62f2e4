"""Binds the settings by gin: files and command-line bindings in, one checked `TrainConfig` out.

The only module that imports gin. gin builds values here; nothing else of the package reads gin's state, and this module
leaves none behind. Imports no TensorFlow.
"""

import dataclasses
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

import gin
from absl import flags
from gin import config_parser

from x3d_tf.config import PARTS, TrainConfig
from x3d_tf.errors import UserError, require

flags.disclaim_key_flags()  # so that --help of a command lists --gin_file among its own

_CONFIGURABLES = (*PARTS.values(), TrainConfig)
for _configurable in _CONFIGURABLES:
    gin.register(_configurable, module="x3d_tf")
_SETTINGS = {part.__name__: [field.name for field in dataclasses.fields(part)] for part in _CONFIGURABLES}
_MACRO = "gin.macro"

_MISTAKES = {  # what gin says of a text, in words that tell what to write
    "Expected newline": "a line must end after its value, and text takes quotes of its own",
    "Unable to parse value": "a setting must have a value after '=', such as 20, True, None or quoted text",
    "Couldn't parse statement": "a line must be a binding, such as Recipe.steps = 100",
    "Unexpected token": "a line must be a binding, such as Recipe.steps = 100",
    "Malformatted scope": "a setting must be named by its part and itself, such as Recipe.steps",
    "Invalid identifier": "a setting must be named by its part and itself, such as Recipe.steps",
    "Expected file path": "include must be followed by a path in quotes",
    "EOF in multi-line statement": "a bracket is never closed",
    "EOF in multi-line string": "a text in three quotes is never closed",
    "unterminated": "a text in quotes is never closed",
    "unhashable": "what stands before ':' in braces must be a number or quoted text",
}

# Limits far above any recipe, which has about a thousand characters and values of one level.
_TEXT_LIMIT = 32 * 1024  # characters of all files and bindings together, a file counted each time that it is included
_NESTING_LIMIT = 10  # includes within includes; brackets and macros within each other
_VALUES_LIMIT = 10_000  # of all texts together, those of a macro counted wherever it is used
_STRING_LIMIT = 4096  # characters
_INTEGER_BITS = 63


@dataclass(frozen=True)
class ParsedConfig:
    """A configuration and the gin text it came from.

    Attributes:
        config: what was built.
        text: all bindings as parsed, as a gin file.
        operative_text: all bindings and defaults as used, as a gin file.
    """

    config: TrainConfig
    text: str
    operative_text: str


def define_flags(*, required: bool) -> None:
    """Defines --gin_file and --gin_bindings for a command."""
    flags.DEFINE_multi_string("gin_file", None, "A .gin file; may be given several times, later files win.")
    flags.DEFINE_multi_string("gin_bindings", None, "One binding, 'Expansion.gamma_b=1.5'; may be given several times.")
    if required:
        flags.mark_flag_as_required("gin_file")


def parse(files: Sequence[str], bindings: Sequence[str] = ()) -> ParsedConfig:
    """Reads gin files and bindings; later ones win.

    A text is data: it sets settings and macros, and runs nothing. Every text is read once, and all are checked before
    the first value is set.

    Args:
        files: paths; one that is not found from the working folder is looked up among the package's own recipes, where
            `gin/x3d_s.gin` and `x3d_s.gin` are the same. What a file includes is looked up beside that file, then among
            the recipes, and nowhere else.
        bindings: lines of gin, `Expansion.gamma_b=1.5`.

    Raises:
        UserError: a missing file, a syntax error, an import, an include of itself or from elsewhere, an unknown name, a
            value out of range, a binding that nothing used.
    """
    reader = _Reader()
    for file in files:
        reader.read_file(find_recipe(file))
    for line in bindings:
        reader.read_text(_Text(f"--gin_bindings={_shortened(line)}", line, None))
    _check_values(reader.bindings)
    gin.clear_config()
    try:
        for binding in reader.bindings:
            gin.bind_parameter(binding.key, binding.value)
        parts = {name: gin.get_configurable(part)() for name, part in PARTS.items()}
        config = gin.get_configurable(TrainConfig)(**parts)
        _raise_unused()
        return ParsedConfig(config, gin.config_str(), gin.operative_config_str())
    except UserError as error:
        raise UserError(str(error).splitlines()[0]) from None  # without gin's account of the call
    except RecursionError:
        raise UserError("no part of the configuration must refer to itself by @") from None
    except (ValueError, TypeError) as error:
        sources = ", ".join([*files, *map(_shortened, bindings)])
        raise UserError(f"{_one_line(error)}{_hint(str(error))} (in {sources})") from error
    finally:
        gin.clear_config()


def find_recipe(file: str) -> Path:
    """The path of a .gin file: as given, or among the recipes that come with the package.

    Raises:
        UserError: it is in neither place.
    """
    if _is_file(Path(file)):
        return Path(file)
    ours = _recipes() / file.removeprefix("gin/")
    if _is_file(ours):
        return ours
    raise UserError(f"--gin_file={file}: no such file here, and none of the package's own: {_known_recipes()}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _recipes() -> Path:
    package = Path(__file__).parent
    return next(folder for folder in (package / "recipes", package.parent / "gin") if folder.is_dir())


def _known_recipes() -> str:
    recipes = _recipes()
    return ", ".join(sorted(f"gin/{path.relative_to(recipes).as_posix()}" for path in recipes.rglob("*.gin")))


@dataclass(frozen=True)
class _Text:
    """Lines of gin.

    Attributes:
        name: of the file, or the flag of the command line, for messages.
        content: the lines.
        folder: of the file, where its includes are looked up first; None for a line of the command line.
    """

    name: str
    content: str
    folder: Path | None

    def place(self, line: int) -> str:
        """Where a line stands, for messages."""
        return self.name if self.folder is None else f"{self.name}, line {line}"


@dataclass(frozen=True)
class _Binding:
    """A value that a text sets.

    Attributes:
        key: scope, configurable and parameter, as gin takes them.
        value: of literals, macros and references to this package's configurables.
        place: file and line, or the binding of the command line, for messages.
    """

    key: tuple[str, str, str]
    value: Any
    place: str


class _Reader:
    """Collects what texts and the files that they include set. Sets nothing itself.

    gin's own functions would execute imports and look for included files wherever the process was told to.

    Attributes:
        bindings: in the order of the texts.
    """

    def __init__(self) -> None:
        self.bindings: list[_Binding] = []
        self._texts: dict[Path, str] = {}
        self._path: list[Path] = []  # of the file that is being read: each is included by the one before
        self._size = 0

    def read_file(self, file: Path) -> None:
        """Takes in a file and what it includes."""
        resolved = file.resolve()
        fits = resolved not in self._path and len(self._path) <= _NESTING_LIMIT
        rule = f"not include itself, nor be the end of more than {_NESTING_LIMIT} includes"
        require(fits, str(file), rule, " > ".join(path.name for path in (*self._path, resolved)))
        if resolved not in self._texts:
            self._texts[resolved] = _content(file)
        self._path.append(resolved)
        self.read_text(_Text(str(file), self._texts[resolved], file.parent))
        self._path.pop()

    def read_text(self, text: _Text) -> None:
        """Takes in a text and what it includes."""
        self._size += len(text.content)
        rule = f"be at most {_TEXT_LIMIT} characters, included files among them"
        require(self._size <= _TEXT_LIMIT, f"{text.name}: the configuration", rule, self._size)
        for statement in _statements(text):
            place = text.place(statement.location.line_num)
            if isinstance(statement, config_parser.ImportStatement):
                rule = "a configuration only sets values and must not import anything"
                raise UserError(f"{place}: {rule}, got {_shortened(statement.format())!r}; delete the line")
            if isinstance(statement, config_parser.IncludeStatement):
                self.read_file(_find_included(statement.filename, text.folder, place))
            elif isinstance(statement, config_parser.BlockDeclaration):
                _require_part(statement.selector, place)
            else:
                self.bindings.append(_binding(statement, place))


def _content(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            content = stream.read(_TEXT_LIMIT + 1)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    require(len(content) <= _TEXT_LIMIT, str(file), f"be at most {_TEXT_LIMIT} bytes", file.stat().st_size)
    zero = content.find(b"\0")
    require(zero < 0, f"{file}, line {content[:zero].count(10) + 1}", "be text", b"\0")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line} must be UTF-8 text, got {content[error.start :][:1]!r}") from None


def _find_included(file: str, folder: Path | None, place: str) -> Path:
    """The path of a file that another includes: beside that, or among the recipes."""
    given = PurePath(file)
    inside = not (given.is_absolute() or ".." in given.parts or "\\" in file or "\0" in file)
    require(inside, f"{place}: the path of an included file", "be relative and without '..'", _shortened(file))
    places = [(folder, file)] if folder else []
    for where, name in [*places, (_recipes(), file.removeprefix("gin/"))]:
        if _is_file(where / name):
            within = (where / name).resolve().is_relative_to(where.resolve())
            rule = "not be a symbolic link that leads out of its folder"
            require(within, f"{place}: the included file {where / name}", rule, str((where / name).resolve()))
            return where / name
    beside = f"neither in {folder} nor" if folder else "not"
    raise UserError(
        f"{place}: the included file {_shortened(file)!r} is {beside} among the package's own: {_known_recipes()}"
    )


class _References(config_parser.ParserDelegate):
    """Makes the references in values: to macros and to this package's configurables, never to others."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Any:
        scope, slash, selector = scoped_configurable_name.rpartition("/")
        part = _require_part(selector, f"@{_shortened(scoped_configurable_name)}")
        return gin.config.ConfigurableReference(f"{scope}{slash}{part}", evaluate)

    def macro(self, macro_name: str) -> Any:
        return gin.config.ConfigurableReference(f"{macro_name}/{_MACRO}", True)


def _statements(text: _Text) -> Iterator[Any]:
    """The statements of a text, as gin's parser sees them."""
    parser = None
    try:
        parser = config_parser.ConfigParser(text.content, _References())
        while statement := parser.parse_statement():
            yield statement
    except (ValueError, SyntaxError, TypeError, LookupError, NameError, StopIteration) as error:
        line = getattr(error, "lineno", None) or (parser.current_token.start[0] if parser else 1)
        raise UserError(f"{text.place(line)}: {_mistake(error)}") from None
    except tokenize.TokenError as error:
        message, (line, _) = error.args
        raise UserError(f"{text.place(line)}: {_in_words(message)}") from None
    except RecursionError:
        rule = f"brackets must be nested at most {_NESTING_LIMIT} deep"
        raise UserError(f"{text.place(parser.current_token.start[0] if parser else 1)}: {rule}") from None


def _mistake(error: Exception) -> str:
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    token = re.search(r"Failed to parse token '(.*)'", message, re.DOTALL)
    if token:
        hint = "Text takes quotes of its own ('DatasetSpec.records=\"folder\"'), and booleans are True and False."
        return f"{_shortened(token.group(1))!r} is not a value. {hint}"
    lines = message.splitlines()  # after the first come gin's own words of the place
    return _in_words(_shortened(lines[0])) if lines else "the last statement is not complete"


def _in_words(message: str) -> str:
    return next((words for start, words in _MISTAKES.items() if message.startswith(start)), message)


def _require_part(selector: str, place: str) -> str:
    """The full name of one of this package's configurables.

    Raises:
        UserError: any other, those of gin itself and of other packages among them.
    """
    name = selector.removeprefix("x3d_tf.")
    require(name in _SETTINGS, f"{place}: the part of a configuration", f"be among {', '.join(_SETTINGS)}", name[:200])
    return f"x3d_tf.{name}"


def _binding(statement: Any, place: str) -> _Binding:
    scope, selector, setting, value, _ = statement
    if not setting:
        return _Binding((f"{scope}/{selector}" if scope else selector, _MACRO, "value"), value, place)
    part = _require_part(selector, place)
    known = _SETTINGS[part.removeprefix("x3d_tf.")]
    require(setting in known, f"{place}: the setting of {selector}", f"be among {', '.join(known)}", setting[:200])
    return _Binding((scope, part, setting), value, place)


def _check_values(bindings: Sequence[_Binding]) -> None:
    """Raises a UserError for values that would take much memory or time, and for macros without a value."""
    macros = {binding.key[0]: binding.value for binding in bindings if binding.key[1] == _MACRO}
    count = 0
    for binding in bindings:
        value = f"{binding.place}: a value"
        for part in _nested(binding.value, macros, binding.place):
            count += 1
            require(count <= _VALUES_LIMIT, f"{binding.place}: all values together", f"be {_VALUES_LIMIT}", "more")
            if isinstance(part, str | bytes):
                require(len(part) <= _STRING_LIMIT, value, f"have at most {_STRING_LIMIT} characters", len(part))
            if isinstance(part, int):
                bits = part.bit_length()
                require(bits <= _INTEGER_BITS, value, f"have at most {_INTEGER_BITS} bits", f"an integer of {bits}")


def _nested(value: Any, macros: Mapping[str, Any], place: str, depth: int = 0) -> Iterator[Any]:
    """A value and all in it, with the values of macros."""
    rule = f"{place}: brackets and macros must be nested at most {_NESTING_LIMIT} deep, and no macro contain itself"
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
            raise UserError(f"{place}: the macro %{_shortened(name)} has no value; set it by a line '{name} = ...'")
        within = (macros[name],)
    for part in within:
        yield from _nested(part, macros, place, depth + 1)


def _raise_unused() -> None:
    unused = sorted(set(_bindings(gin.config._CONFIG)) - set(_bindings(gin.config._OPERATIVE_CONFIG)))
    if unused:
        raise UserError(
            f"nothing uses {_shortened(', '.join(unused))}: settings take no scope, their parts are set by their own "
            "names ('Expansion.gamma_b=1.5'), and a macro must be referred to"
        )


def _bindings(config: dict[tuple[str, str], dict[str, object]]) -> Iterator[str]:
    for (scope, selector), values in config.items():
        if selector == "gin.macro":
            yield f"%{scope}"
            continue
        for parameter in values:
            yield f"{scope + '/' if scope else ''}{selector.removeprefix('x3d_tf.')}.{parameter}"


def _hint(message: str) -> str:
    """What the setting might have been meant to be."""
    if "missing 1 required positional argument: 'records'" in message:
        return " Give the file of a network first (--gin_file=gin/x3d_s.gin), or set DatasetSpec.records."
    return ""


def _shortened(text: str) -> str:
    """A text of the user's as a message shows it."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
