"""How fast are the forms of a network, ours and its peers', at making predictions?

Each framework has a process of its own, and in each round each form has its turn: one call that does not count, then
one that is timed. Weights are random. Columns:

  ms/clip    median over the rounds, of a call divided by its clips; then 10th and 90th percentile
  of peak    two operations for each multiply-add, as a part of what a float32 matrix product of NumPy's reaches, which
             has its turn in each round, too. Forms in fewer bits may exceed it
  speed      how many times as fast as the fastest float32 mode of PyTorch: the median of the rounds' ratios
  max diff.  largest difference of a probability from that of the first form of ours, or of the peers'. Float32 forms
             that differ by more than 1e-5 are marked, and the exit status is 1

Forms whose packages are missing say so in their row. Keras' own grouped convolution is so slow that it gets two calls
of one clip.

  python benchmarks/forward.py
  python benchmarks/forward.py --networks x3d_s x3d_m --batches 1 8 --threads 2 --rounds 20 --json=forward.json
  python benchmarks/forward.py --forms deployed 'TFLite*' 'torch*' --rounds 5
"""

from command import measure_networks, parser, run
from measuring import Form, Work

PEER_ONNX = "pytorchvideo.onnx"


def ours(name: str, form: str) -> Form:
    """A form that TensorFlow runs."""
    process = "TensorFlow, one thread an operation" if "side by side" in form else "TensorFlow"
    return Form(name, "ours", Work(process, "tensorflow_forms:predict", {"form": form}))


def tflite(name: str, form: str) -> Form:
    """A TFLite file."""
    file = f"{name}.tflite"
    return Form(
        name,
        "ours",
        Work("LiteRT", "file_forms:ours", {"file": file, "runtime": "litert"}),
        Work("export", "file_forms:write_tflite", {"file": file, "form": form}),
        exact=form == "float32",
    )


def torch(name: str, precision: str = "float32", **settings: object) -> Form:
    """A mode of PyTorch's."""
    exact = precision == "float32"
    # frozen in a process of its own: else torch takes what it compiled for the same module without
    process = "PyTorch frozen" if settings.get("frozen") else "PyTorch"
    work = Work(process, "torch_forms:predict", {"precision": precision, **settings})
    return Form(name, "peers", work, exact=exact, reference=exact)


def exported(name: str, process: str, function: str, form: str, *, exact: bool = True, **settings: str) -> Form:
    """What our ONNX exporter writes: "onnx" or "openvino"."""
    file = {"onnx": "{network}.onnx", "openvino": "{network}.xml"}[form]
    work = Work(process, f"file_forms:{function}", {"file": file, **settings})
    return Form(name, "ours", work, Work("export", "file_forms:write_exported", {"form": form}), exact=exact)


def peer_file(name: str, process: str, function: str, *, exact: bool = True, **settings: object) -> Form:
    """pytorchvideo's ONNX."""
    work = Work(process, f"file_forms:{function}", {"file": PEER_ONNX, **settings})
    written = Work("PyTorch export", "torch_forms:export_onnx", {"file": PEER_ONNX})
    return Form(name, "peers", work, written, exact=exact)


FORMS = (
    ours("trainable", "trainable"),
    ours("portable", "portable"),
    ours("portable, not compiled", "portable, not compiled"),
    ours("deployed", "deployed"),
    ours("trainable, clips side by side", "trainable side by side"),
    ours("deployed, clips side by side", "deployed side by side"),
    ours("frozen", "frozen"),
    Form(
        "SavedModel",
        "ours",
        Work("TensorFlow", "file_forms:ours", {"file": "serving/1", "runtime": "tensorflow"}),
        Work("export", "file_forms:write_saved_model"),
    ),
    tflite("TFLite float32", "float32"),
    tflite("TFLite float16", "float16"),
    tflite("TFLite dynamic", "dynamic"),
    tflite("TFLite int8", "int8"),
    exported("ONNX", "ONNX Runtime", "ours", "onnx", runtime="onnxruntime"),
    exported("OpenVINO", "OpenVINO", "ours", "openvino", runtime="openvino"),
    exported("OpenVINO bf16", "OpenVINO", "openvino", "openvino", exact=False, precision="bf16"),
    torch("torch eager"),
    torch("torch channels_last_3d", layout="channels_last_3d"),
    torch("torch compile", compiled=True),
    torch("torch compile channels_last_3d", layout="channels_last_3d", compiled=True),
    torch("torch compile frozen channels_last_3d", layout="channels_last_3d", compiled=True, frozen=True),
    torch("torch bf16 channels_last_3d", "bfloat16", layout="channels_last_3d"),
    peer_file("torch ONNX in ONNX Runtime", "ONNX Runtime", "onnxruntime"),
    peer_file("torch ONNX in OpenVINO float32", "OpenVINO", "openvino", precision="f32", peer=True),
    peer_file("torch ONNX in OpenVINO bf16", "OpenVINO", "openvino", exact=False, precision="bf16", peer=True),
    # in a process of its own: XLA compiles it, and it takes long
    Form("Keras Conv3D(groups=C)", "ours", Work("Keras", "tensorflow_forms:predict", {"form": "grouped"}), slow=True),
)


def main() -> None:
    """Measures, prints the tables and writes the JSON file."""
    settings = parser(__doc__, FORMS, networks=["x3d_s"], batches=[1], rounds=20, json="forward.json").parse_args()
    measure_networks(FORMS, settings, passes=1)


if __name__ == "__main__":
    run(main)
