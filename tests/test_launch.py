import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

LAUNCH = ROOT / "scripts" / "launch"
# What JobSet's v1alpha2 definition has in these places, and batch/v1 Job in the next.
JOBSET_SPEC = {"replicatedJobs", "failurePolicy", "successPolicy", "startupPolicy", "network", "suspend", "coordinator"}
JOBSET_SPEC |= {"managedBy", "ttlSecondsAfterFinished"}
JOB_SPEC = {"parallelism", "completions", "completionMode", "backoffLimit", "podFailurePolicy", "template"}


@pytest.mark.parametrize("script", ["local.sh", "tpu_vm.sh", "slurm.sbatch"])
def test_bash_can_read_it(script: str) -> None:
    checked = subprocess.run(["bash", "-n", str(LAUNCH / script)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_jobsets_have_the_fields_of_their_definition() -> None:
    documents: list[dict[str, Any]] = list(yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text(encoding="utf-8")))
    assert [document["kind"] for document in documents] == ["JobSet", "JobSet"]
    resources = []
    for document in documents:
        assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
        spec = document["spec"]
        assert spec.keys() <= JOBSET_SPEC
        assert spec["failurePolicy"].keys() <= {"maxRestarts", "restartStrategy", "rules"}
        (rule,) = spec["failurePolicy"]["rules"]
        assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
        assert rule.keys() <= {"name", "action", "onJobFailureReasons", "targetReplicatedJobs"}
        (replicated,) = spec["replicatedJobs"]
        assert replicated.keys() <= {"name", "replicas", "template", "dependsOn", "groupName"}
        job = replicated["template"]["spec"]
        assert job.keys() <= JOB_SPEC
        assert job["parallelism"] == job["completions"]
        assert job["completionMode"] == "Indexed", "JAX takes the process's number from it"
        assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
        pod = job["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        (container,) = pod["containers"]
        assert container["command"][:3] == ["python", "scripts/train.py", "--distributed"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        resources += container["resources"]["limits"]
    assert resources == ["google.com/tpu", "nvidia.com/gpu"]


@pytest.fixture
def gcloud(tmp_path: Path) -> Path:
    """A program of that name that prints its arguments, one a line."""
    stub = tmp_path / "gcloud"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def tpu_vm(path: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}", **variables}
    command = ["bash", str(LAUNCH / "tpu_vm.sh"), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_tpu_vm_starts_the_same_command_on_every_host(gcloud: Path) -> None:
    done = tpu_vm(gcloud, "--config=a.py", "--workdir=my runs/a", TPU_NAME="mine", ZONE="z", PROJECT="p")
    assert done.stdout.splitlines() == [
        *("compute", "tpus", "tpu-vm", "ssh", "mine", "--zone=z", "--project=p", "--worker=all"),
        "--command=cd picogpt_jax && exec .venv/bin/python scripts/train.py --distributed "
        "--initialization_timeout_seconds=300 --config=a.py --workdir=my\\ runs/a",
    ]


def test_tpu_vm_stops_what_it_has_started(gcloud: Path) -> None:
    done = tpu_vm(gcloud, TPU_NAME="mine", ZONE="z", TPU_STOP="1")
    assert done.stdout.splitlines()[-1].startswith("--command=pkill -TERM -f ")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "error: TPU_NAME is not set: "),
        ({"TPU_NAME": "mine"}, "error: ZONE is not set: "),
        ({"TPU_NAME": "mine", "ZONE": "z"}, "error: no flags for scripts/train.py: "),
    ],
)
def test_tpu_vm_says_what_is_missing(gcloud: Path, variables: dict[str, str], message: str) -> None:
    done = tpu_vm(gcloud, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)


def test_local_wants_the_number_of_processes_first() -> None:
    command = ["bash", str(LAUNCH / "local.sh"), "--config=a.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.startswith("error: the first argument is the number of processes")) == (
        2,
        True,
    )


def test_ctrl_c_reaches_a_process_as_one_signal_to_save_on(tmp_path: Path) -> None:
    """A terminal sends SIGINT to the launcher's whole group; a second signal would end a training without saving."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!{sys.executable}\n"
        "import os, signal, sys, time\n"
        "if sys.argv[1] == '-c':\n"
        "    exec(sys.argv[2])\n"
        "    raise SystemExit\n"
        "got = []\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(number, lambda number, _: got.append(number))\n"
        # Each line at once: the other process writes too.
        "os.write(1, b'ready\\n')\n"
        "while not got:\n"
        "    time.sleep(0.01)\n"
        "time.sleep(0.5)\n"
        "os.write(1, f'got {[*map(int, got)]}\\n'.encode())\n"
    )
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    # bash cannot trap a signal that it inherits ignored, as it is in a worker of pytest's.
    default_sigint = "import os, signal, sys; signal.signal(2, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
    launcher = subprocess.Popen(
        [sys.executable, "-c", default_sigint, "bash", str(LAUNCH / "local.sh"), "2"],
        env={**os.environ, "PYTHON": str(stand_in)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert launcher.stdout is not None
    assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    os.killpg(launcher.pid, signal.SIGINT)
    rest, _ = launcher.communicate(timeout=60)
    assert rest.splitlines() == [f"got {[int(signal.SIGTERM)]}"] * 2
