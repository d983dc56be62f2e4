"""Trains with .gin files that try to execute code, to hang or to exhaust memory: each must be rejected in one line.

The named files are given to the command. A module in the working folder creates a canary file if it is imported. In
addition, --count random mutants of the package's recipes are parsed in a worker process; each must be rejected in one
line or be a valid recipe.

  python tests/trials/hostile_recipes.py --count=300 --seed=0
"""

import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from harness import ROOT, Broke, Report, Worker, arguments, outcome_of, refused, run, scratch

GOOD = (ROOT / "gin" / "x3d_s.gin").read_text()
DYNAMIC = "from __gin__ import dynamic_registration\n"
CANARY = "canary"
TOUCH = f"touch {CANARY}"

# Files that execute code: name -> files, of which evil.gin is given to the command.
CODE: dict[str, dict[str, str]] = {
    "import": {"evil.gin": f"import evilmod\n{GOOD}"},
    "import after bindings": {"evil.gin": f"{GOOD}\nimport evilmod\n"},
    "import as": {"evil.gin": f"import evilmod as fine\n{GOOD}"},
    "from import": {"evil.gin": f"from evilmod import name\n{GOOD}"},
    "import of a module in a package": {"evil.gin": f"import evilpack.evilmod\n{GOOD}"},
    "import of a loaded module": {"evil.gin": f"import os\n{GOOD}"},
    "import in an include": {"evil.gin": f"include 'other.gin'\n{GOOD}", "other.gin": "import evilmod\n"},
    "import two includes deep": {
        "evil.gin": "include 'a.gin'\n",
        "a.gin": f"{GOOD}\ninclude 'b.gin'\n",
        "b.gin": "import evilmod\n",
    },
    "dynamic registration, subprocess": {
        "evil.gin": f"{DYNAMIC}import subprocess\nimport x3d_tf.config\n{GOOD}"
        f"subprocess.getoutput.cmd = '{TOUCH}'\nTrainConfig.init = @subprocess.getoutput()\n"
    },
    "dynamic registration, os": {
        "evil.gin": f"{DYNAMIC}import os\n{GOOD}os.system.command = '{TOUCH}'\nTrainConfig.seed = @os.system()\n"
    },
    "dynamic registration in an include": {
        "evil.gin": f"include 'other.gin'\n{GOOD}",
        "other.gin": f"{DYNAMIC}import subprocess\nsubprocess.getoutput.cmd = '{TOUCH}'\n"
        "TrainConfig.init = @subprocess.getoutput()\n",
    },
    "reference to a configurable of gin": {"evil.gin": f"{GOOD}\nTrainConfig.init = @gin.singleton()\n"},
    "reference to a singleton": {
        "evil.gin": f"{GOOD}\nTrainConfig.init = @x/singleton()\nx/singleton.constructor=@a\n"
    },
    "expression": {"evil.gin": f"{GOOD}\nRecipe.steps = __import__('os').system('{TOUCH}')\n"},
    "lambda": {"evil.gin": f"{GOOD}\nRecipe.steps = (lambda: 1)()\n"},
}

# Files that hang, exhaust memory or break the parser.
BROKEN: dict[str, dict[str, str | bytes]] = {
    "includes itself": {"evil.gin": "include 'evil.gin'\n"},
    "includes in a circle": {"evil.gin": "include 'a.gin'\n", "a.gin": "include './evil.gin'\n"},
    "nests 50 includes": {
        "evil.gin": "include '1.gin'\n",
        **{f"{number}.gin": f"include '{number + 1}.gin'\n" for number in range(1, 50)},
        "50.gin": GOOD,
    },
    "includes an endless file": {"evil.gin": "include '/dev/zero'\n"},
    "includes a system file": {"evil.gin": f"include '/etc/passwd'\n{GOOD}"},
    "includes a file in the parent folder": {"evil.gin": f"include '../above.gin'\n{GOOD}"},
    "includes a folder": {"evil.gin": f"include '.'\n{GOOD}"},
    "includes an empty path": {"evil.gin": f"include ''\n{GOOD}"},
    "deep brackets": {"evil.gin": f"{GOOD}\nRecipe.decay_fractions = {'(' * 5000}{')' * 5000}\n"},
    "deep lists": {"evil.gin": f"{GOOD}\nRecipe.decay_fractions = {'[' * 100_000}\n"},
    "open bracket": {"evil.gin": f"{GOOD}\nRecipe.decay_fractions = (1,\n"},
    "open string": {"evil.gin": f"{GOOD}\nTrainConfig.init = '''abc\n"},
    "open quote": {"evil.gin": f"{GOOD}\nTrainConfig.init = 'abc\n"},
    "unknown name": {"evil.gin": f"{GOOD}\nRecipe.steps = unknown\n"},
    "unknown macro": {"evil.gin": f"{GOOD}\nRecipe.steps = %unknown\n"},
    "macro of itself": {"evil.gin": f"{GOOD}\na = %b\nb = %a\nRecipe.steps = %a\n"},
    "reference to itself": {"evil.gin": f"{GOOD}\nTrainConfig.recipe = @TrainConfig()\n"},
    "indentation": {"evil.gin": f"{GOOD}\n   Recipe.steps = 5\n \tRecipe.batch = 2\n"},
    "zero bytes": {"evil.gin": b"\0" * 100},
    "invalid UTF-8": {"evil.gin": b"\xff\xfe\xfa" + GOOD.encode()},
    "terminal escapes": {"evil.gin": f"{GOOD}\nRecipe.\x1b]0;title\x07steps = 5\n"},
    "escapes in a value": {"evil.gin": f"{GOOD}\nTrainConfig.init = 'a\x1b[2Jb'\n"},
    "20 MB": {"evil.gin": "# filler\n" * 2_000_000 + "Recipe.steps = unknown\n"},
    "number of 10,000 digits": {"evil.gin": f"{GOOD}\nRecipe.steps = {'9' * 10_000}\n"},
    "infinite number": {"evil.gin": f"{GOOD}\nRecipe.learning_rate = 1e999\n"},
    "huge network": {"evil.gin": f"{GOOD}\nExpansion.gamma_d = 1e9\n"},
    "huge clip": {"evil.gin": f"{GOOD}\nExpansion.gamma_t = 1000000000000\n"},
    "scope": {"evil.gin": f"{GOOD}\nevil/Recipe.steps = 5\n"},
}

BINDINGS = {
    "binding that imports": ["import evilmod"],
    "binding that imports in its second line": ["Recipe.steps=5\nimport evilmod"],
    "binding that includes": ["include 'other.gin'"],
    "bindings of dynamic registration": [
        DYNAMIC.strip(),
        "import subprocess",
        f"subprocess.getoutput.cmd='{TOUCH}'",
        "TrainConfig.init=@subprocess.getoutput()",
    ],
}


def prepare(folder: Path, files: dict[str, Any]) -> Path:
    """Writes the files of a trial and the module that creates the canary."""
    evil = "import pathlib\npathlib.Path('canary').touch()\nname = 1\n"
    for name, content in {
        "evilmod.py": evil,
        "evilpack/__init__.py": evil,
        "evilpack/evilmod.py": evil,
        **files,
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder.parent / "above.gin").write_text("import evilmod\n")
    return folder


def attempt(report: Report, folder: Path, files: dict[str, Any], bindings: list[str]) -> str | None:
    """Runs one command in the trial's folder, which is therefore on its Python path."""
    prepare(folder, files)
    words = [f"--gin_bindings={binding}" for binding in bindings]
    ended = run(
        "x3d_tf.train",
        "--gin_file=evil.gin",
        *words,
        f"--workdir={folder / 'run'}",
        folder=folder,
        seconds=report.chosen.seconds,
        megabytes=1500,
    )
    if (folder / CANARY).exists():
        return "CODE WAS EXECUTED: the canary file exists"
    return refused(ended)


def pipe(report: Report, folder: Path) -> str | None:
    """Gives a named pipe without a writer as the recipe."""
    folder.mkdir()
    os.mkfifo(folder / "evil.gin")
    return attempt_of_path(report, folder, "evil.gin")


def attempt_of_path(report: Report, folder: Path, path: str) -> str | None:
    folder.mkdir(exist_ok=True)
    words = (f"--gin_file={path}", f"--workdir={folder / 'run'}")
    return refused(run("x3d_tf.train", *words, folder=folder, seconds=report.chosen.seconds, megabytes=1500))


def parser() -> Callable[[str], tuple[str, str]]:
    """Returns a function that parses a file; runs in the worker."""
    from x3d_tf import gin_config

    return lambda path: outcome_of(lambda: gin_config.parse([path]).config)


def mutants(report: Report, folder: Path) -> None:
    """Parses random mutants: characters replaced or deleted, and tokens of gin inserted."""
    reader = Worker(parser, seconds=10, megabytes=1000)
    tokens = [
        "include ",
        "import os\n",
        "from ",
        "@",
        "%",
        "(",
        ")",
        "'",
        '"',
        "\\\n",
        "\t",
        "=",
        "#",
        "\0",
        "1e9",
        "-",
        "/",
    ]
    recipes = sorted((ROOT / "gin").rglob("*.gin"))
    for number in range(report.chosen.count):
        rng = random.Random(f"{report.chosen.seed}/{number}")
        content = list(rng.choice(recipes).read_text())
        for _ in range(rng.randint(1, 6)):
            index = rng.randrange(len(content))
            content[index : index + rng.choice((0, 1, 1, 5))] = rng.choice([*tokens, chr(rng.randrange(256))])
        path = folder / "mutant.gin"
        path.write_text("".join(content), encoding="utf-8", errors="replace")
        try:
            kind, text = reader.ask(str(path))
            report.note(f"{'valid' if kind == 'gives' else 'rejected'} mutants")
            multiline = "\n" in text if kind == "refuses" else False
            problem = f"ends in a traceback: {text}" if kind == "breaks" else "not one line" if multiline else None
        except Broke as error:
            problem = f"the parser {error}"
        report.add(f"mutant {number}", problem)
    reader.close()


def main() -> None:
    """Runs the trials."""
    report = Report("hostile_recipes", arguments(__doc__ or "", count=300, seconds=45))
    with scratch() as folder:
        files: dict[str, dict[str, Any]] = {**CODE, **BROKEN}
        named: list[tuple[str, dict[str, Any], list[str]]] = [(name, files[name], []) for name in files]
        other = {"evil.gin": GOOD, "other.gin": "import evilmod\n"}
        named += [(name, other, bindings) for name, bindings in BINDINGS.items()]
        trials = [
            (name, partial(attempt, report, folder / str(number), written, bindings))
            for number, (name, written, bindings) in enumerate(named)
        ]
        trials.append(("a pipe", partial(pipe, report, folder / "pipe")))
        trials += [(path, partial(attempt_of_path, report, folder / "path", path)) for path in ("/dev/zero", "/", "")]
        report.run(trials)
        if not report.chosen.only or report.chosen.only in "mutant":
            mutants(report, folder)
    report.close()


if __name__ == "__main__":
    main()
