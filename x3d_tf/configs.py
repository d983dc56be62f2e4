"""Binds the settings by gin: files and command-line bindings in, one checked `TrainConfig` out.

The only module that imports gin. gin builds values here; nothing else of the package reads gin's state, and this module
leaves none behind. Imports no TensorFlow.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gin
from absl import flags

from x3d_tf._checks import UserError
from x3d_tf.runs.recipe import PARTS, TrainConfig

flags.disclaim_key_flags()  # so that --help of a command lists --gin_file among its own

_CONFIGURABLES = (*PARTS.values(), TrainConfig)
for _configurable in _CONFIGURABLES:
    gin.register(_configurable, module="x3d_tf")


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

    Args:
        files: paths; one that is not found from the working folder is looked up among the package's own recipes, where
            `gin/x3d_s.gin` and `x3d_s.gin` are the same.
        bindings: lines of gin, `Expansion.gamma_b=1.5`.

    Raises:
        UserError: a missing file, a syntax error, an unknown name, a value out of range, a binding that nothing used.
    """
    paths = [str(find_recipe(file)) for file in files]
    gin.clear_config()
    try:
        gin.parse_config_files_and_bindings(paths, list(bindings), finalize_config=False)
        parts = {name: gin.get_configurable(part)() for name, part in PARTS.items()}
        config = gin.get_configurable(TrainConfig)(**parts)
        _raise_unused()
        return ParsedConfig(config, gin.config_str(), gin.operative_config_str())
    except UserError as error:
        raise UserError(str(error).splitlines()[0]) from None  # without gin's account of the call
    except (ValueError, TypeError, SyntaxError, OSError) as error:
        sources = ", ".join([*paths, *bindings])
        raise UserError(f"{_one_line(error)}{_hint(str(error))} (in {sources})") from error
    finally:
        gin.clear_config()


def find_recipe(file: str) -> Path:
    """The path of a .gin file: as given, or among the recipes that come with the package.

    Raises:
        UserError: it is in neither place.
    """
    if Path(file).is_file():
        return Path(file)
    package = Path(__file__).parent
    recipes = next(folder for folder in (package / "recipes", package.parent / "gin") if folder.is_dir())
    ours = recipes / file.removeprefix("gin/")
    if ours.is_file():
        return ours
    known = ", ".join(sorted(f"gin/{path.relative_to(recipes).as_posix()}" for path in recipes.rglob("*.gin")))
    raise UserError(f"--gin_file={file}: no such file here, and none of the package's own: {known}")


def _raise_unused() -> None:
    unused = sorted(set(_bindings(gin.config._CONFIG)) - set(_bindings(gin.config._OPERATIVE_CONFIG)))
    if unused:
        raise UserError(
            f"nothing uses {', '.join(unused)}: settings take no scope, their parts are set by their own names "
            "('Expansion.gamma_b=1.5'), and a macro must be referred to"
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
    parameter = re.search(r"'(\w+)' doesn't have a parameter named '(\w+)'", message)
    settings = {part.__name__: [field.name for field in dataclasses.fields(part)] for part in _CONFIGURABLES}
    if parameter:
        return f" It has: {', '.join(settings.get(parameter.group(1), []))}."
    if "missing 1 required positional argument: 'records'" in message:
        return " Give the file of a network first (--gin_file=gin/x3d_s.gin), or set DatasetSpec.records."
    if "No configurable matching" in message:
        return f" There are: {', '.join(settings)}."
    if "Failed to parse token" in message or "malformed node" in message:
        return " Text takes quotes of its own ('DatasetSpec.records=\"folder\"'), and booleans are True and False."
    return ""


def _one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
