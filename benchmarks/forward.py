"""Measures the inference speed of our implementations of a network, and of the peers' implementations.

Each framework runs in a separate process. In each round, every implementation makes one warm-up call and one timed
call. Weights are random. Columns:

  ms/clip    median over the rounds of the time per clip, followed by the 10th and 90th percentile
  of peak    floating-point operations per second (two per multiply-add), relative to a float32 matrix product in NumPy
             that is also timed in each round. Implementations with lower precision may exceed 100 %
  speed      speed relative to the fastest float32 mode of PyTorch: the median of the ratios within each round
  max diff.  maximum difference of a probability from the first implementation in the group, ours or peers. Float32
             implementations with a difference above 1e-5 are marked, and the exit status is 1

If the packages of an implementation are missing, its row says so. Keras' grouped convolution is very slow and therefore
measured with two calls of one clip.

  python benchmarks/forward.py
  python benchmarks/forward.py --networks x3d_s x3d_m --batches 1 8 --threads 2 --rounds 20 --json=forward.json
  python benchmarks/forward.py --forms folded 'TFLite*' 'torch*' --rounds 5
"""

from command import measure_networks, parser, run
from measuring import Implementation, Job

PEER_ONNX = "pytorchvideo.onnx"


def ours(name: str) -> Implementation:
    """Returns an implementation in TensorFlow; the name is a key of `tensorflow_networks.FORWARD`."""
    process = "TensorFlow, single-threaded ops" if "in parallel" in name else "TensorFlow"
    return Implementation(name, "ours", Job(process, "tensorflow_networks:predict", {"name": name}))


def tflite(name: str, format_name: str) -> Implementation:
    """Returns the TFLite file of a format."""
    file = f"{name}.tflite"
    return Implementation(
        name,
        "ours",
        Job("LiteRT", "file_formats:ours", {"file": file, "runtime": "litert"}),
        Job("export", "file_formats:write_tflite", {"file": file, "format_name": format_name}),
        exact=format_name == "float32",
    )


def torch(name: str, precision: str = "float32", **settings: object) -> Implementation:
    """Returns a mode of PyTorch."""
    exact = precision == "float32"
    # A separate process for freezing: otherwise torch reuses the module that it compiled without freezing.
    process = "PyTorch frozen" if settings.get("frozen") else "PyTorch"
    job = Job(process, "torch_networks:predict", {"precision": precision, **settings})
    return Implementation(name, "peers", job, exact=exact, reference=exact)


def exported(
    name: str,
    process: str,
    function: str,
    format_name: str,
    *,
    written_for: str,
    exact: bool = True,
    **settings: str,
) -> Implementation:
    """Returns the file of the format "onnx" or "openvino" that our exporter writes with `--runtime=written_for`."""
    file = f"for_{written_for}/{{network}}.{'onnx' if format_name == 'onnx' else 'xml'}"
    run = Job(process, f"file_formats:{function}", {"file": file, **settings})
    write = Job("export", "file_formats:write_exported", {"format_name": format_name, "runtime": written_for})
    return Implementation(name, "ours", run, write, exact=exact)


def peer_file(name: str, process: str, function: str, *, exact: bool = True, **settings: object) -> Implementation:
    """Returns pytorchvideo's ONNX file in a runtime."""
    run = Job(process, f"file_formats:{function}", {"file": PEER_ONNX, **settings})
    write = Job("PyTorch export", "torch_networks:export_onnx", {"file": PEER_ONNX})
    return Implementation(name, "peers", run, write, exact=exact)


def throughput(precision: str, *, peer: bool) -> Implementation:
    """Returns the clips of a batch one by one in OpenVINO's throughput mode, from our file or pytorchvideo's."""
    file = f"single_{PEER_ONNX}" if peer else "for_openvino_1/{network}.xml"
    options = {"file": file, "precision": precision, "peer": peer}
    run = Job("OpenVINO", "file_formats:openvino_throughput", options)
    if peer:
        write = Job("PyTorch export", "torch_networks:export_onnx", {"file": file, "batch": 1})
    else:
        settings = {"format_name": "openvino", "runtime": "openvino", "batch": 1}
        write = Job("export", "file_formats:write_exported", settings)
    name = f"{'torch ONNX in OpenVINO' if peer else 'OpenVINO'} throughput {precision}"
    return Implementation(name, "peers" if peer else "ours", run, write, exact=precision == "f32")


IMPLEMENTATIONS = (
    ours("trainable"),
    ours("portable"),
    ours("portable, not compiled"),
    ours("folded"),
    ours("trainable, clips in parallel"),
    ours("folded, clips in parallel"),
    ours("frozen"),
    Implementation(
        "SavedModel",
        "ours",
        Job("TensorFlow", "file_formats:ours", {"file": "serving/1", "runtime": "tensorflow"}),
        Job("export", "file_formats:write_saved_model"),
    ),
    tflite("TFLite float32", "float32"),
    tflite("TFLite float16", "float16"),
    tflite("TFLite dynamic", "dynamic"),
    tflite("TFLite int8", "int8"),
    exported("ONNX", "ONNX Runtime", "ours", "onnx", written_for="onnxruntime", runtime="onnxruntime"),
    exported("ONNX grouped", "ONNX Runtime", "ours", "onnx", written_for="openvino", runtime="onnxruntime"),
    exported("OpenVINO", "OpenVINO", "openvino", "openvino", written_for="openvino", precision="f32"),
    exported("OpenVINO taps", "OpenVINO", "openvino", "onnx", written_for="onnxruntime", precision="f32"),
    exported(
        "OpenVINO bf16", "OpenVINO", "openvino", "openvino", written_for="openvino", exact=False, precision="bf16"
    ),
    torch("torch eager"),
    torch("torch channels_last_3d", layout="channels_last_3d"),
    torch("torch compile", compiled=True),
    torch("torch compile channels_last_3d", layout="channels_last_3d", compiled=True),
    torch("torch compile frozen channels_last_3d", layout="channels_last_3d", compiled=True, frozen=True),
    torch("torch bf16 channels_last_3d", "bfloat16", layout="channels_last_3d"),
    peer_file("torch ONNX in ONNX Runtime", "ONNX Runtime", "onnxruntime"),
    peer_file("torch ONNX in OpenVINO float32", "OpenVINO", "openvino", precision="f32", peer=True),
    peer_file("torch ONNX in OpenVINO bf16", "OpenVINO", "openvino", exact=False, precision="bf16", peer=True),
    throughput("f32", peer=False),
    throughput("bf16", peer=False),
    throughput("f32", peer=True),
    throughput("bf16", peer=True),
    # In a separate process, because it is compiled by XLA and slow.
    Implementation(
        "Keras Conv3D(groups=C)", "ours", Job("Keras", "tensorflow_networks:predict", {"name": "grouped"}), slow=True
    ),
)


def main() -> None:
    """Measures, prints the tables and writes the JSON file."""
    arguments = parser(__doc__, IMPLEMENTATIONS, networks=["x3d_s"], batches=[1], rounds=20, json="forward.json")
    measure_networks(IMPLEMENTATIONS, arguments.parse_args(), passes=1)


if __name__ == "__main__":
    run(main)
