"""How fast are TFLite files, beside OpenVINO, a SavedModel and Keras?

All forms of one network are exported as the commands of `export/` do it, with random weights and made-up clips to
calibrate with, and called with one clip at a time: in each round all have their turn, each in a process of its runtime
and number of threads. Medians, and the median over the rounds of each form's time in units of OpenVINO's.

It needs what ONNX and OpenVINO export takes: pip install 'x3d_tf[tflite,openvino]'.

  python benchmarks/tflite.py
  python benchmarks/tflite.py --network=x3d_m --threads=2 --json=tflite.json
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from folding import machine, network, squares, versions  # the benchmark beside this one
from x3d_tf.export import tflite
from x3d_tf.export.models import open_model
from x3d_tf.export.onnx import export_formats
from x3d_tf.export.runtimes import Artefact, quiet
from x3d_tf.export.saved_model import export_saved_model
from x3d_tf.export.workers import Workers

import x3d_tf
from x3d_tf.modeling.deployed import deployed


def main() -> None:
    """Measures, prints the tables and writes the JSON file."""
    settings = parse_arguments()
    quiet()
    model = network(settings.network)
    clips = squares(1, model.clip)
    with tempfile.TemporaryDirectory() as folder, Workers() as workers:
        artefacts = export_all(model, Path(folder))
        bytes_of = {name: artefact.bytes for name, artefact in artefacts.items()}
        figures: dict[int, dict[str, dict[str, float]]] = {}
        for threads in settings.threads:
            seconds: dict[str, list[float]] = {name: [] for name in artefacts}
            for artefact in artefacts.values():
                workers.open(artefact, threads)
                workers.probabilities(artefact, threads, clips)
            for _ in range(settings.rounds):
                for name, artefact in artefacts.items():
                    seconds[name].append(workers.seconds(artefact, threads, clips))
            figures[threads] = summary(seconds)
            print(f"{settings.network}, batch 1, {threads} threads, {settings.rounds} rounds")
            print(f"{'form':14} {'MB':>6} {'ms/clip':>9} {'of OpenVINO':>11}")
            for name, row in figures[threads].items():
                print(f"{name:14} {bytes_of[name] / 1e6:6.1f} {row['ms']:9.1f} {row['time_over_openvino']:11.2f}")
    result = {"settings": vars(settings), "figures": figures, "bytes": bytes_of}
    result |= {"versions": versions(), "machine": machine()}
    Path(settings.json).write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {settings.json}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="x3d_s", choices=list(x3d_tf.VARIANTS))
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", default="tflite.json", help="where to write the figures")
    return parser.parse_args()


def export_all(model: x3d_tf.X3D, folder: Path) -> dict[str, Artefact]:
    """All forms of the network, as files in the folder."""
    file = folder / "model.keras"
    x3d_tf.save(model, file, [f"class {number}" for number in range(model.num_classes)])
    source = open_model(file)
    *_, openvino = export_formats(source, folder, ["openvino"])
    artefacts = {
        "OpenVINO": Artefact(openvino, "openvino"),
        "Keras": Artefact(file, "tensorflow"),
        "SavedModel": Artefact(export_saved_model(source, folder / "serving"), "tensorflow"),
    }
    app = deployed(model, batch=1)
    calibration = squares(4, model.clip)[:, None]  # any, for speed does not depend on them
    for form, until in [("float32", ""), ("float16", ""), ("dynamic", ""), *(("int8", u) for u in tflite.FLOAT_UNTIL)]:
        name = f"int8, {until}" if until else form
        path = folder / f"{name}.tflite"
        path.write_bytes(tflite.convert(app, form, calibration, **({"float_until": until} if until else {})))
        artefacts[name] = Artefact(path, "litert")
    return artefacts


def summary(seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Medians of each form."""
    return {
        name: {
            "ms": 1000 * statistics.median(own),
            "time_over_openvino": statistics.median(a / b for a, b in zip(own, seconds["OpenVINO"])),
        }
        for name, own in seconds.items()
    }


if __name__ == "__main__":
    main()
