"""What the benchmarks' command lines share."""

import argparse
import fnmatch
import sys
from collections.abc import Callable, Sequence
from typing import Any

from measuring import Case, Form, Measurement, measure
from reporting import figures, machine, network_table, write_json

import x3d_tf
from x3d_tf.processes import available_cpus

CLASSES = 400


def parser(
    description: str | None, forms: Sequence[Form], *, networks: list[str], batches: list[int], rounds: int, json: str
) -> argparse.ArgumentParser:
    """The flags that all benchmarks have, with a benchmark's defaults."""
    names = ", ".join(form.name for form in forms)
    found = argparse.ArgumentParser(
        description=description,
        epilog=f"Forms: {names}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--networks", nargs="+", default=networks, choices=list(x3d_tf.VARIANTS), metavar="NAME")
    found.add_argument("--batches", nargs="+", type=positive, default=batches, metavar="N", help="clips of a call")
    found.add_argument(
        "--threads", type=positive, default=available_cpus(), help="of each process; all CPUs by default"
    )
    found.add_argument("--rounds", type=positive, default=rounds, help="in each of which all forms have a turn")
    help_forms = "names, patterns such as 'torch*', @ours or @peers; all by default"
    found.add_argument("--forms", nargs="+", metavar="FORM", help=help_forms)
    found.add_argument("--json", default=json, help=f"where to write the figures; {json} by default")
    found.add_argument("--verbose", action="store_true", help="show what the frameworks print")
    return found


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def chosen(forms: Sequence[Form], patterns: Sequence[str] | None) -> list[Form]:
    """The forms that any of the patterns means, in their own order; all where there are none.

    Raises:
        SystemExit: a pattern that means no form.
    """
    if patterns is None:
        return list(forms)
    wanted = set()
    for pattern in patterns:
        found = {form.name for form in forms if _means(pattern, form)}
        if not found:
            known = ", ".join(form.name for form in forms)
            sys.exit(f"error: --forms must name forms, got {pattern!r}; known: {known}, @ours, @peers")
        wanted |= found
    return [form for form in forms if form.name in wanted]


def _means(pattern: str, form: Form) -> bool:
    return pattern == f"@{form.group}" or fnmatch.fnmatchcase(form.name.lower(), pattern.lower())


def measure_networks(forms: Sequence[Form], settings: argparse.Namespace, passes: int) -> None:
    """Measures each network with each batch, prints a table of each, and writes the JSON file after each.

    Args:
        forms: to choose from.
        settings: the parsed flags.
        passes: how often a call computes as much as a forward pass does: once, or three times in training.
    """
    forms, tables, differing = chosen(forms, settings.forms), [], set()
    for network in settings.networks:
        macs = x3d_tf.cost(network, num_classes=CLASSES).macs
        for batch in settings.batches:
            before = machine()
            case = Case(network, batch, settings.threads, verbose=settings.verbose)
            measurement = measure(forms, case, settings.rounds)
            table = figures(measurement, 2 * macs * passes) | {"machine_before": before}
            print("\n".join(network_table(table, settings.threads)), end="\n\n", flush=True)
            tables.append(table)
            write_json(settings.json, vars(settings), tables)
            differing |= _differing(measurement)
    print(f"written to {settings.json}")
    if differing:
        sys.exit(f"error: these forms compute something else than the first of their group: {', '.join(differing)}")


def _differing(measurement: Measurement) -> set[str]:
    return {row.form.name for row in measurement.forms if row.differs}


def run(main: Callable[[], Any]) -> None:
    """Calls `main`; Ctrl-C becomes exit status 130, as in the package's commands."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
