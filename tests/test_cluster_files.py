"""The files of docs/cluster and the Dockerfile: scripts run with stand-ins for SLURM, manifests are parsed.

None of them is run on SLURM, Kubernetes or Docker here.
"""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from absl import flags
from packaging.requirements import Requirement
from packaging.version import Version
from test_packaging import requirements

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "cluster"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])
MANIFESTS = sorted(FOLDER.glob("*.yaml"))
SHOW_CONFIG = ("python3", "-c", "import os; print(os.environ['TF_CONFIG'])")

# Flags that are documented before the commands have them.


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Stand-ins for the programs of SLURM, which write their arguments to the file `calls`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    bodies = {
        "scontrol": '[ "$1" = show ] && printf "node7\\nnode8\\nnode9\\n"; exit 0',
        "srun": 'exit "${SRUN_STATUS:-0}"',
        "python": "exit 0",
        "ray": 'exit "${RAY_STATUS:-0}"',
        "sleep": "exit 0",
    }
    for name, body in bodies.items():
        file = folder / name
        file.write_text(f'#!/bin/sh\necho "{name} $*" >> "{tmp_path}/calls"\n{body}\n')
        file.chmod(0o755)
    return folder


def run(
    programs: Path, script: str, *arguments: str, environment: Mapping[str, object]
) -> subprocess.CompletedProcess[str]:
    """Runs a script with the stand-ins and with these variables only."""
    variables = {"PATH": f"{programs}:/usr/bin:/bin", **{name: str(value) for name, value in environment.items()}}
    command = ["bash", str(FOLDER / script), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)


def calls(programs: Path, name: str) -> list[list[str]]:
    file = programs.parent / "calls"
    lines = [shlex.split(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line[1:] for line in lines if line[0] == name]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.read_text().startswith("#!/usr/bin/env bash\n# ")
    assert os.access(script, os.X_OK) == (script.suffix == ".sh")  # SLURM reads the others


SLURM = {"SLURM_JOB_NODELIST": "node[7-9]", "SLURM_NTASKS": 3, "SLURM_JOB_ID": 41}


@pytest.mark.parametrize("index", range(3))
def test_tf_config_of_a_slurm_job(programs: Path, index: int) -> None:
    done = run(programs, "with_tf_config.sh", *SHOW_CONFIG, environment=SLURM | {"SLURM_PROCID": index})
    assert json.loads(done.stdout) == {
        "cluster": {"worker": ["node7:12041", "node8:12041", "node9:12041"]},
        "task": {"type": "worker", "index": index},
    }
    assert calls(programs, "scontrol") == [["show", "hostnames", "node[7-9]"]]


@pytest.mark.parametrize("name", ["WORKER_INDEX", "JOB_COMPLETION_INDEX"])
def test_tf_config_of_listed_machines(programs: Path, name: str) -> None:
    environment = {"WORKER_HOSTS": "x3d-worker-0-0.x3d x3d-worker-0-1.x3d", name: 1}
    done = run(programs, "with_tf_config.sh", *SHOW_CONFIG, environment=environment)
    assert json.loads(done.stdout) == {
        "cluster": {"worker": ["x3d-worker-0-0.x3d:12345", "x3d-worker-0-1.x3d:12345"]},
        "task": {"type": "worker", "index": 1},
    }


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "WORKER_HOSTS must list the machines outside of SLURM"),
        ({"WORKER_HOSTS": "a b"}, "the index of the worker must be in 0..1, got ''"),
        ({"WORKER_HOSTS": "a b", "WORKER_INDEX": 2}, "the index of the worker must be in 0..1, got '2'"),
        ({"WORKER_HOSTS": "a b", "WORKER_INDEX": "-1"}, "must be in 0..1, got '-1'"),
        ({"WORKER_HOSTS": "a b", "WORKER_INDEX": "$(id)"}, "must be in 0..1, got '$(id)'"),
        ({"WORKER_HOSTS": 'a","b c', "WORKER_INDEX": 0}, "the name of a machine must have letters"),
        (SLURM | {"SLURM_PROCID": 0, "SLURM_NTASKS": 6}, "SLURM_NTASKS must be 3, one task for each machine"),
    ],
)
def test_tf_config_of_a_wrong_job(programs: Path, environment: dict[str, object], message: str) -> None:
    done = run(programs, "with_tf_config.sh", *SHOW_CONFIG, environment=environment)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr


def test_the_command_of_a_worker_keeps_its_arguments_and_status(programs: Path) -> None:
    command = ("python3", "-c", "import sys; print(sys.argv[1:]); sys.exit(7)", "a b", "$HOME", "")
    done = run(programs, "with_tf_config.sh", *command, environment={"WORKER_HOSTS": "a", "WORKER_INDEX": 0})
    assert (done.returncode, done.stdout) == (7, "['a b', '$HOME', '']\n")
    assert "a command must follow" in run(programs, "with_tf_config.sh", environment={"WORKER_HOSTS": "a"}).stderr


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"), [(0, None, False), (1, None, True), (143, 9, True), (1, 10, False)]
)
def test_a_failed_training_is_requeued(programs: Path, status: int, restarts: int | None, requeued: bool) -> None:
    environment = SLURM | {"SLURM_CPUS_PER_TASK": 32, "SRUN_STATUS": status}
    environment |= {} if restarts is None else {"SLURM_RESTART_COUNT": restarts}
    done = run(programs, "train.sbatch", "--gin_file=a.gin", "--workdir=/shared/a b", environment=environment)
    assert done.returncode == status
    assert calls(programs, "scontrol") == ([["requeue", "41"]] if requeued else [])
    ((*options, script, python, _, module, gin_file, _, _),) = calls(programs, "srun")
    assert options == ["--kill-on-bad-exit=1", "--cpus-per-task=32"]
    assert (ROOT / script).is_file() and (python, module, gin_file) == ("python", "x3d_tf.train", "--gin_file=a.gin")


def test_the_tasks_of_an_array_build_all_parts(programs: Path) -> None:
    (array,) = re.findall(r"^#SBATCH --array=0-(\d+)$", (FOLDER / "records.sbatch").read_text(), re.MULTILINE)
    for task in range(int(array) + 1):
        environment = {"SLURM_ARRAY_TASK_ID": task, "SLURM_CPUS_PER_TASK": 16}
        run(programs, "records.sbatch", "--output=r", environment=environment)
    run(programs, "records_finish.sbatch", "--output=r", environment={})
    build = ["-m", "x3d_tf.build_records", "--output=r"]
    parts = [[*build, "--workers=16", f"--part={number}/16"] for number in range(1, 17)]
    assert calls(programs, "python") == [*parts, [*build, "--finish"]]


def test_the_search_connects_to_ray_on_the_first_machine(programs: Path) -> None:
    environment = SLURM | {"SLURM_CPUS_PER_TASK": 16}
    run(programs, "search_ray.sbatch", "--gin_file=a.gin", environment=environment)
    (search,) = calls(programs, "python")
    assert search[:3] == ["-m", "x3d_tf.expand", "--gin_file=a.gin"] and "--ray=node7:20041" in search
    assert calls(programs, "ray") == [["health-check", "--address=node7:20041"]]


def test_the_search_ends_if_ray_does(programs: Path) -> None:
    environment = SLURM | {"SLURM_CPUS_PER_TASK": 16, "RAY_STATUS": 1}
    assert run(programs, "search_ray.sbatch", environment=environment).returncode == 1
    assert calls(programs, "python") == []


@pytest.mark.parametrize("task", range(2))
def test_each_machine_of_the_search_starts_ray(programs: Path, task: int) -> None:
    text = (FOLDER / "search_ray.sbatch").read_text()
    (body,) = re.findall(r"bash -c '(.*?)' ray-node", text, re.DOTALL)
    variables = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_PROCID": str(task), "SLURM_CPUS_PER_TASK": "16"}
    subprocess.run(["bash", "-c", body, "ray-node", "20041", "node7:20041"], env=variables, check=True, timeout=60)
    head = [["start", "--head", "--port=20041", "--num-cpus=16", "--block"]]
    other = [["health-check", "--address=node7:20041"], ["start", "--address=node7:20041", "--num-cpus=16", "--block"]]
    assert calls(programs, "ray") == (other if task else head)


def supervised(programs: Path, body: str) -> subprocess.CompletedProcess[str]:
    command = ("python3", "-c", f"import pathlib, sys\ncount = pathlib.Path(sys.argv[1])\n{body}")
    return run(programs, "supervise.sh", *command, str(programs.parent / "count"), environment={})


def test_a_command_is_run_until_it_succeeds(programs: Path) -> None:
    done = supervised(programs, "open(count, 'a').write('x')\nsys.exit(0 if count.stat().st_size == 4 else 9)")
    assert done.returncode == 0 and (programs.parent / "count").read_text() == "xxxx"
    assert done.stderr.count("ended with status 9") == 3 and calls(programs, "sleep") == [["10"]] * 3


def test_a_command_is_run_at_most_ten_times(programs: Path) -> None:
    done = supervised(programs, "open(count, 'a').write('x')\nsys.exit(3)")
    assert done.returncode == 3 and (programs.parent / "count").read_text() == "x" * 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_and_the_loop(programs: Path, number: signal.Signals) -> None:
    """The command gets SIGTERM and may take its time, as training does to save a checkpoint."""
    started, saved = programs.parent / "started", programs.parent / "saved"
    body = (
        "import pathlib, signal, sys, time\n"
        f"def stop(*_):\n    time.sleep(0.3)\n    pathlib.Path({str(saved)!r}).touch()\n    sys.exit(143)\n"
        f"signal.signal(signal.SIGTERM, stop)\npathlib.Path({str(started)!r}).touch()\ntime.sleep(50)"
    )
    command = ["bash", str(FOLDER / "supervise.sh"), "python3", "-c", body]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as process:
        while not started.exists():
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(timeout=30) == 143
    assert saved.exists()


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text("utf-8")):
            yield f"{path.name}: {document['kind']}", document


DOCUMENTS = list(documents())


def pod_of(document: dict[str, Any]) -> dict[str, Any]:
    """Returns the specification of the pods of a Job, a JobSet or a TrainingRuntime."""
    spec = document["spec"]
    if document["kind"] == "TrainingRuntime":
        spec = spec["template"]["spec"]
    if "replicatedJobs" in spec:
        (spec,) = [job["template"]["spec"] for job in spec["replicatedJobs"]]
    pod: dict[str, Any] = spec["template"]["spec"]
    return pod


# Fields of the custom resources as their published Go types name them: jobset_types.go (v1alpha2) and trainjob_types.go
# and trainingruntime_types.go (v1alpha1). Only those that could be used here.
FIELDS = {
    ("JobSet", "jobset.x-k8s.io/v1alpha2"): {"replicatedJobs", "network", "failurePolicy", "successPolicy", "suspend"},
    ("TrainJob", "trainer.kubeflow.org/v1alpha1"): {"runtimeRef", "trainer", "suspend", "runtimePatches"},
    ("TrainingRuntime", "trainer.kubeflow.org/v1alpha1"): {"mlPolicy", "podGroupPolicy", "template"},
    ("Job", "batch/v1"): {
        *("completionMode", "completions", "parallelism", "backoffLimit", "backoffLimitPerIndex", "template"),
    },
}
INNER = {
    "network": {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"},
    "failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "runtimeRef": {"name", "apiGroup", "kind"},
    "trainer": {"image", "command", "args", "env", "numNodes", "resourcesPerNode"},
    "mlPolicy": {"numNodes"},
    "replicatedJobs": {"name", "replicas", "template"},
}


@pytest.mark.parametrize(("name", "document"), DOCUMENTS, ids=[name for name, _ in DOCUMENTS])
def test_manifests_have_known_fields(name: str, document: dict[str, Any]) -> None:
    def check(value: object, within: str = "") -> None:
        if isinstance(value, list):
            for item in value:
                check(item, within)
        elif isinstance(value, dict):
            assert set(value) <= INNER.get(within, set(value)), f"{name}: {within}"
            for key, item in value.items():
                check(item, key)

    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(document["spec"]) <= FIELDS[document["kind"], document["apiVersion"]]
    check(document["spec"])


@pytest.mark.parametrize(("name", "document"), DOCUMENTS, ids=[name for name, _ in DOCUMENTS])
def test_pods_are_started_again_together_and_without_privileges(name: str, document: dict[str, Any]) -> None:
    if document["kind"] == "TrainJob":
        return
    pod = pod_of(document)
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never" and pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert f"USER {pod['securityContext']['runAsUser']}\n" in (ROOT / "Dockerfile").read_text()


def test_the_hosts_of_a_jobset_are_its_pods() -> None:
    (document,) = yaml.safe_load_all((FOLDER / "train_jobset.yaml").read_text())
    (job,) = document["spec"]["replicatedJobs"]
    spec, name = job["template"]["spec"], document["metadata"]["name"]
    assert spec["completions"] == spec["parallelism"] and spec["completionMode"] == "Indexed"
    assert spec["backoffLimit"] == 0 < document["spec"]["failurePolicy"]["maxRestarts"]
    (container,) = pod_of(document)["containers"]
    assert job["replicas"] == 1 and document["spec"]["network"]["enableDNSHostnames"] is True
    hosts = [f"{name}-{job['name']}-0-{pod}.{name}" for pod in range(spec["completions"])]
    assert container["env"] == [{"name": "WORKER_HOSTS", "value": " ".join(hosts)}]


def test_the_hosts_of_a_trainjob_are_its_pods() -> None:
    runtime, train = yaml.safe_load_all((FOLDER / "train_trainjob.yaml").read_text())
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = pod_of(runtime)["containers"]
    assert job["name"] == container["name"] == "node"  # the trainer finds it by this name and by the label
    assert job["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    name, trainer = train["metadata"]["name"], train["spec"]["trainer"]
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    assert train["spec"]["runtimeRef"] == reference
    hosts = [f"{name}-node-0-{pod}.{name}" for pod in range(trainer["numNodes"])]
    assert trainer["env"] == [{"name": "WORKER_HOSTS", "value": " ".join(hosts)}]
    (jobset,) = yaml.safe_load_all((FOLDER / "train_jobset.yaml").read_text())
    (same,) = pod_of(jobset)["containers"]
    assert (trainer["command"], trainer["args"]) == (same["command"], same["args"])
    assert trainer["resourcesPerNode"] == same["resources"]


def test_the_jobs_build_all_parts_with_the_same_flags() -> None:
    names = ("records_job.yaml", "records_finish_job.yaml")
    parts, finish = (yaml.safe_load((FOLDER / name).read_text()) for name in names)
    commands = [pod_of(document)["containers"][0]["command"][-1] for document in (parts, finish)]
    count = parts["spec"]["completions"]
    for index in range(count):
        script = (
            f'python() {{ printf "%s\\n" "$@"; }}; JOB_COMPLETION_INDEX={index}; {commands[0].removeprefix("exec ")}'
        )
        printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split()
        assert printed[-1] == f"--part={index + 1}/{count}"
    common = commands[1].removesuffix(" --finish")
    assert commands[0].startswith(common) and commands[0] != common


def command_lines() -> Iterator[tuple[str, str, set[str]]]:
    """Yields the file, the module and the flags of each command in the files and on the page about them."""
    texts = {path.name: path.read_text("utf-8") for path in [*SCRIPTS, *MANIFESTS]}
    texts["cluster.md"] = "\n".join(
        re.findall(r"^```\n(.*?)^```$", (ROOT / "docs" / "cluster.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    )
    for name, text in texts.items():
        joined = re.sub(r"\s*\\\n#?\s*", " ", text)
        for line in joined.splitlines():
            for module, rest in re.findall(r"-m (x3d_tf\.\w+)(.*)", line):
                yield name, module, set(re.findall(r"(?<=\s)--(\w+)", rest))


@pytest.mark.usefixtures("flags_of_one_command")
def test_commands_have_the_flags_that_the_files_give() -> None:
    found = list(command_lines())
    assert {module for _, module, _ in found} >= {"x3d_tf.train", "x3d_tf.build_records", "x3d_tf.expand"}
    for module in {module for _, module, _ in found}:
        before = set(flags.FLAGS)
        importlib.import_module(module).define_flags()
        known = set(flags.FLAGS)
        for name in known - before:
            delattr(flags.FLAGS, name)
        for name, _, given in (entry for entry in found if entry[1] == module):
            assert given <= known, f"{name}: {module}"


def instructions() -> list[str]:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    joined = text.replace("\\\n", " ")
    return [line for line in joined.splitlines() if line and not line.startswith("#")]


def test_the_image_has_the_tensorflow_of_the_requirements() -> None:
    (tag,) = (line.removeprefix("ARG TAG=") for line in instructions() if line.startswith("ARG TAG="))
    (required,) = [entry for entry in requirements() if entry.name == "tensorflow" and not entry.extras]
    assert isinstance(required, Requirement) and required.specifier.contains(Version(tag.removesuffix("-gpu")))
    bases = [line.split()[1] for line in instructions() if line.startswith("FROM")]
    assert bases == ["tensorflow/tensorflow:${TAG}"] * 2 and tag.endswith("-gpu")


def test_the_image_has_no_cache_and_no_root() -> None:
    pip = [line for line in instructions() if " pip " in line]
    assert len(pip) == 2 and all("--no-cache-dir" in line for line in pip)
    users = [line.split()[1] for line in instructions() if line.startswith("USER")]
    assert users and users[-1] != "root" and int(users[-1]) > 0


def test_the_image_is_built_from_what_the_wheel_needs() -> None:
    """`.dockerignore` lets pass what the wheel of test_packaging is built from, and the copied script."""
    from built_wheel import PLACES

    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    passed = {line[1:] for line in lines if line.startswith("!")}
    copied = {line.split()[1] for line in instructions() if line.startswith("COPY") and "--from" not in line} - {"."}
    assert passed == {*PLACES, "setup.cfg", "pyproject.toml", "README.md", "LICENSE", *copied}
    assert all((ROOT / name).exists() for name in passed)
