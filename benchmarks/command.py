"""Command-line interface shared by the benchmarks."""

import argparse
import fnmatch
import sys
from collections.abc import Callable, Sequence
from typing import Any

from measuring import Case, Implementation, Measurement, measure
from reporting import figures, machine_info, network_table, write_json

import x3d_tf
from x3d_tf.processes import available_cpus

CLASSES = 400


def parser(
    description: str | None,
    implementations: Sequence[Implementation],
    *,
    networks: list[str],
    batches: list[int],
    rounds: int,
    json: str,
) -> argparse.ArgumentParser:
    """Returns a parser with the flags that all benchmarks share, and the given defaults."""
    names = ", ".join(implementation.name for implementation in implementations)
    arguments = argparse.ArgumentParser(
        description=description,
        epilog=f"Implementations: {names}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("--networks", nargs="+", default=networks, choices=list(x3d_tf.VARIANTS), metavar="NAME")
    arguments.add_argument("--batches", nargs="+", type=positive, default=batches, metavar="N", help="batch sizes")
    arguments.add_argument(
        "--threads", type=positive, default=available_cpus(), help="number of threads per process; default: all CPUs"
    )
    arguments.add_argument(
        "--rounds", type=positive, default=rounds, help="rounds; each times every implementation once"
    )
    help_forms = "implementations to measure: names, patterns such as 'torch*', @ours or @peers; default: all"
    arguments.add_argument("--forms", nargs="+", metavar="NAME", help=help_forms)
    arguments.add_argument("--json", default=json, help=f"JSON file to write; default: {json}")
    arguments.add_argument("--verbose", action="store_true", help="show the output of the frameworks")
    return arguments


def positive(text: str) -> int:
    """Parses a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def select(implementations: Sequence[Implementation], patterns: Sequence[str] | None) -> list[Implementation]:
    """Returns the implementations that match any of the patterns, in their original order; all without patterns.

    Raises:
        SystemExit: a pattern matches no implementation.
    """
    if patterns is None:
        return list(implementations)
    selected = set()
    for pattern in patterns:
        names = {implementation.name for implementation in implementations if _matches(pattern, implementation)}
        if not names:
            known = ", ".join(implementation.name for implementation in implementations)
            sys.exit(f"error: --forms must name implementations, got {pattern!r}; known: {known}, @ours, @peers")
        selected |= names
    return [implementation for implementation in implementations if implementation.name in selected]


def _matches(pattern: str, implementation: Implementation) -> bool:
    return pattern == f"@{implementation.group}" or fnmatch.fnmatchcase(implementation.name.lower(), pattern.lower())


def measure_networks(implementations: Sequence[Implementation], settings: argparse.Namespace, passes: int) -> None:
    """Measures each network with each batch size; prints a table and updates the JSON file after each of them.

    Args:
        implementations: implementations to select from.
        settings: parsed flags.
        passes: operations of a call relative to a forward pass: 1 for inference, 3 for training.
    """
    implementations, tables, differing = select(implementations, settings.forms), [], set()
    for network in settings.networks:
        macs = x3d_tf.cost(network, num_classes=CLASSES).macs
        for batch in settings.batches:
            before = machine_info()
            case = Case(network, batch, settings.threads, verbose=settings.verbose)
            measurement = measure(implementations, case, settings.rounds)
            table = figures(measurement, 2 * macs * passes) | {"machine_before": before}
            print("\n".join(network_table(table, settings.threads)), end="\n\n", flush=True)
            tables.append(table)
            write_json(settings.json, vars(settings), tables)
            differing |= _differing(measurement)
    print(f"written to {settings.json}")
    if differing:
        sys.exit(f"error: outputs differ from the first implementation of the group: {', '.join(differing)}")


def _differing(measurement: Measurement) -> set[str]:
    return {result.implementation.name for result in measurement.results if result.differs}


def run(main: Callable[[], Any]) -> None:
    """Calls `main`; Ctrl-C becomes exit status 130, as in the package's commands."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
