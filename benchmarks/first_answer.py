"""Measures the time from a command to its answer: the classes of one video, from 10 clips.

  python benchmarks/first_answer.py --video=party.mp4                # X3D-S
  python benchmarks/first_answer.py --video=party.mp4 --network=x3d_m --rounds=9

Each command is a new process; all take turns. Ours is `python -m x3d_tf.predict` with the model file and with each
exported file whose runtime is installed. The peer is the shortest program with PyTorch and PyAV that does the same:
import, build pytorchvideo's network, decode the video, run 10 clips in channels_last_3d. "speed" is relative to the
peer, within a round. The weights are random, which does not change the time.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from command import positive, run
from reporting import markdown, median_ratio
from tqdm import tqdm

import x3d_tf
from x3d_tf.errors import require

PEER = "PyTorch and PyAV"
CLIPS = 10
_EXPORTS = {"onnx": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino"), "tflite": ("ai_edge_litert",)}


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, required=True, help="video of about 10 seconds")
    parser.add_argument("--network", default="x3d_s", choices=[*x3d_tf.VARIANTS], metavar="NAME")
    parser.add_argument("--rounds", type=positive, default=5, help="runs of each command. Defaults to 5")
    parser.add_argument("--peer", action="store_true", help="only print the peer's answer")
    settings = parser.parse_args()
    if settings.peer:
        answer_in_torch(settings.network, str(settings.video))
        return
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            f"predict, {name}": predict(file, settings.video) for name, file in models(settings.network, folder)
        }
        if find_spec("torch") and find_spec("pytorchvideo"):
            commands[PEER] = [
                sys.executable,
                __file__,
                "--peer",
                f"--network={settings.network}",
                f"--video={settings.video}",
            ]
        times = measure(commands, settings.rounds)
    print("\n".join(table(times)))


def models(network: str, folder: str) -> list[tuple[str, Path]]:
    """Writes the model file and its exports in a process, because TensorFlow would stay in this one."""
    file = Path(folder) / "model.keras"
    code = (
        "import x3d_tf; from x3d_tf.types import Storage\n"
        f"model = x3d_tf.build_x3d({network!r}, num_classes=400); model.stored = Storage(256, 95)\n"
        f"x3d_tf.save(model, {str(file)!r}, [str(number) for number in range(400)])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    found = [("Keras file", file)]
    installed = [name for name, packages in _EXPORTS.items() if all(map(find_spec, packages))]
    for name in installed:
        module, formats = ("tflite", "float32") if name == "tflite" else ("onnx", name)
        command = [sys.executable, "-m", f"x3d_tf.export.{module}", f"--model={file}", f"--formats={formats}"]
        subprocess.run([*command, f"--output={folder}/{name}"], check=True, capture_output=True)
        (exported,) = (path for path in Path(folder, name).iterdir() if path.suffix in (".onnx", ".xml", ".tflite"))
        found.append((f"{name} file", exported))
    return found


def predict(model: Path, video: Path) -> list[str]:
    """Returns our command."""
    return [sys.executable, "-m", "x3d_tf.predict", f"--model={model}", f"--views={CLIPS}", str(video)]


def measure(
    commands: dict[str, list[str]],
    rounds: int,
    call: Callable[[list[str]], object] | None = None,
) -> dict[str, list[float]]:
    """Returns the seconds of each command in each round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    with tqdm(total=(rounds + 1) * len(commands), unit="command") as bar:
        for number in range(rounds + 1):
            for name, command in commands.items():
                started = time.perf_counter()
                (call or _call)(command)
                times[name] += [time.perf_counter() - started] if number else []
                bar.update()
    return times


def _call(command: Sequence[str]) -> None:
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    require(ended.returncode == 0, " ".join(command), "succeed", ended.stderr)


def table(times: dict[str, list[float]]) -> list[str]:
    """Returns the lines of a table with one row per command."""
    peer = times.get(PEER)
    rows = [
        [
            name,
            f"{statistics.median(seconds):.2f}",
            f"{min(seconds):.2f} - {max(seconds):.2f}",
            f"{median_ratio(peer, seconds):.2f}" if peer else "-",
            "",
        ]
        for name, seconds in times.items()
    ]
    return markdown(["command", "seconds", "from - to", "speed", ""], rows)


def answer_in_torch(network: str, video: str) -> None:
    """The peer's program: prints the five most probable classes."""
    import av
    import numpy as np
    import torch
    import torch_networks

    clip, size = x3d_tf.VARIANTS[network].expansion.clip, x3d_tf.VARIANTS[network].expansion.test_size
    torch.set_flush_denormal(True)
    model = torch_networks.network(network).to(memory_format=torch.channels_last_3d).eval()
    with av.open(video) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    starts = np.linspace(0, max(0, len(frames) - clip.frames * clip.stride), CLIPS).astype(int)
    shape = (1, 3, clip.frames, clip.size, clip.size)
    # Written into: with a batch of 1, `contiguous` leaves strides for which PyTorch's convolutions are slow.
    pixels = torch.empty(shape, memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        probabilities = torch.zeros(400)
        for start in starts:
            numbers = np.minimum(start + np.arange(clip.frames) * int(clip.stride), len(frames) - 1)
            taken = torch.from_numpy(np.stack([frames[number] for number in numbers])).permute(0, 3, 1, 2).float()
            taken = torch.nn.functional.interpolate(taken, scale_factor=size / min(taken.shape[2:]), mode="bilinear")
            top, left = ((side - clip.size) // 2 for side in taken.shape[2:])
            crop = taken[:, :, top : top + clip.size, left : left + clip.size].permute(1, 0, 2, 3)
            pixels[0].copy_((crop / 255 - 0.45) / 0.225)
            probabilities += torch.softmax(model(pixels), dim=1)[0] / CLIPS
    values, classes = probabilities.topk(5)
    for value, number in zip(values.tolist(), classes.tolist()):
        print(f"{value:6.1%}  {number}")


if __name__ == "__main__":
    run(main)
