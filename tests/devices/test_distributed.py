"""Real processes on this machine, joined over gloo; every training has two CPU devices, the four-process one four."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ROOT
from tiny import TEXT, same, tiny_config, write_data

from picogpt_jax.config import Config
from picogpt_jax.devices import distributed
from picogpt_jax.devices.distributed import AgreedError, Largest, check_mesh, cpu_devices, is_lost, together
from picogpt_jax.devices.sharding import make_mesh
from picogpt_jax.errors import UserError
from picogpt_jax.training.checkpoint import Checkpoints
from picogpt_jax.training.trainer import Trainer

HEARTBEAT_SECONDS = 10
PATIENCE_SECONDS = 240  # a hang, not a slow machine


@dataclasses.dataclass
class Site:
    """Where all the trainings of this file run: they share the data and the compiled programs."""

    folder: Path
    data_dir: Path

    def environment(self, devices: int, **more: str) -> dict[str, str]:
        cluster = ("SLURM_", "OMPI_", "KUBERNETES_", "JAX_COORDINATOR")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(cluster)}
        return {
            **inherited,
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            **more,
        }

    def flags(self, workdir: Path, **changes: Any) -> list[str]:
        config = tiny_config(self.data_dir, **{"mesh__data": -1, **changes}).to_dict()
        return [
            f"--config={ROOT / 'configs' / 'base.py'}",
            f"--workdir={workdir}",
            f"--heartbeat_timeout_seconds={HEARTBEAT_SECONDS}",
            *(
                f"--config.{section}.{key}={value}"
                for section in ("model", "quant", "optimizer", "train", "mesh", "data")
                for key, value in config[section].items()
            ),
        ]

    def start(self, devices: int, *flags: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), *flags]
        return self._popen(command, self.environment(devices, **environment))

    def launch(self, processes: int, devices: int, *flags: str, **environment: str) -> subprocess.Popen[str]:
        command = ["bash", str(ROOT / "scripts" / "launch" / "local.sh"), str(processes), *flags]
        return self._popen(command, self.environment(devices, **environment))

    def _popen(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return subprocess.Popen(command, cwd=self.folder, env=environment, text=True, **pipes)

    def join(self, processes: int, *flags: str, devices: int = 1) -> list[subprocess.Popen[str]]:
        """Processes without a launcher, which would end the others when one is lost."""
        address = f"localhost:{free_port()}"
        return [
            self.start(
                devices, *flags, f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={i}"
            )
            for i in range(processes)
        ]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("processes")
    return Site(folder, write_data(folder / "data", TEXT))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def ended(*processes: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


def finish(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    with ended(process):
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == status, err
    return out, err


def wait_for(done: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not done():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def losses(workdir: Path) -> list[tuple[int, str, float]]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["split"], line["loss"]) for line in lines]


def n_lines(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def state(workdir: Path, step: int, n_devices: int = 1) -> Any:
    with Checkpoints(workdir) as checkpoints:
        config = Config.from_dict(checkpoints.meta(step)["config"])
        return checkpoints.restore(Trainer(config, jax.devices()[:n_devices]).abstract_state, step).state


# ------------------------------------------------------------------------------------------------ the same training


@pytest.fixture(scope="module")
def one(site: Site) -> Path:
    """Eight steps in one process with two devices."""
    workdir = site.folder / "one"
    finish(site.start(2, *site.flags(workdir)))
    return workdir


@pytest.fixture(scope="module")
def two(site: Site, one: Path) -> Path:
    """The same in two processes with a device each; `one` has compiled nothing for it, but keeps the machine quiet."""
    workdir = site.folder / "two"
    out, err = finish(site.launch(2, 1, *site.flags(workdir)))
    assert out.count("best validation loss") == 1, "process 0 speaks for all"
    assert err.count("8/8 steps") == 1
    return workdir


def test_two_processes_train_as_one_bit_for_bit(one: Path, two: Path) -> None:
    assert losses(two) == losses(one)
    assert same(state(two, 8), state(one, 8))
    assert json.loads((two / "config.json").read_text()) == json.loads((one / "config.json").read_text())


def test_two_processes_train_in_integers_as_one(site: Site) -> None:
    short = dict(quant__arithmetic="integer", train__max_iters=4)
    workdirs = [site.folder / f"integer_{processes}" for processes in (1, 2)]
    finish(site.start(2, *site.flags(workdirs[0], **short)))
    finish(site.launch(2, 1, *site.flags(workdirs[1], **short)))
    assert losses(workdirs[1]) == losses(workdirs[0])
    assert same(state(workdirs[1], 4), state(workdirs[0], 4))


def test_what_two_processes_wrote_is_read_by_any_number_of_devices(two: Path) -> None:
    expected = state(two, 8)
    for n_devices in (2, 4):
        assert same(state(two, 8, n_devices), expected)


def test_four_processes_go_on_where_two_stopped(site: Site, one: Path, two: Path) -> None:
    """Eight steps more: in four processes after two, and in one after one. The sums are in another order by then."""
    longer = dict(train__max_iters=16)
    finish(site.start(2, *site.flags(one, **longer)))
    out, _ = finish(site.launch(4, 1, *site.flags(two, **longer)))
    assert f"resumed {two} at step 8" in out
    assert [event[:2] for event in losses(two)] == [event[:2] for event in losses(one)]
    np.testing.assert_allclose([event[2] for event in losses(two)], [event[2] for event in losses(one)], rtol=1e-3)


def test_a_text_too_large_for_the_devices_is_read_in_shares(site: Site) -> None:
    """Each process asks for its own rows of a batch and no others, and the batch is that of one process."""
    program = """
import sys
import jax, numpy as np
from picogpt_jax.devices import distributed
from picogpt_jax.training import trainer
from picogpt_jax.text.batches import Tokens
from tiny import tiny_config
distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
trainer.RESIDENT_BYTES = 0
config = tiny_config(sys.argv[3], mesh__data=2)
asked = []
class Spy(Tokens):
    def windows(self, starts, length):
        asked.append(starts.shape)
        return Tokens.windows(self, starts, length)
tokens = Tokens.open(config.data.dir, "train", 8, config.model.vocab_size)
batches = trainer.Batches(config, Spy(tokens.ids, tokens.path), trainer.Trainer(config).mesh)
local = np.asarray(batches(3, 5).addressable_shards[0].data)
print(asked, local.tolist(), sep="|")
"""
    address = f"localhost:{free_port()}"
    search = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    started = [
        site._popen(
            [sys.executable, "-c", program, address, str(index), str(site.data_dir)],
            site.environment(1, PYTHONPATH=search),
        )
        for index in (0, 1)
    ]
    with ended(*started):
        # The last line: gloo says before it that the processes are connected.
        answers = [finish(process)[0].splitlines()[-1].split("|") for process in started]
    assert [asked for asked, _ in answers] == ["[(2, 4)]", "[(2, 4)]"], "half of each of two batches of eight"
    config = tiny_config(site.data_dir)
    from picogpt_jax.text.batches import Tokens
    from picogpt_jax.training import trainer as trainer_module

    tokens = Tokens.open(config.data.dir, "train", 8, config.model.vocab_size)
    batches = trainer_module.Batches(config, tokens, Trainer(config, jax.devices()[:1]).mesh)
    windows = np.asarray(tokens.ids)[np.asarray(batches(3, 5))[..., None] + np.arange(9)]
    np.testing.assert_array_equal(np.concatenate([json.loads(rows) for _, rows in answers], axis=1), windows)


# ------------------------------------------------------------------------------------------------------------- faults


def test_sigterm_to_one_process_stops_all_at_one_step_and_the_launcher_goes_on(site: Site) -> None:
    workdir, undisturbed = site.folder / "preempted", site.folder / "undisturbed"
    endless = dict(train__max_iters=1_000_000, train__eval_interval=1_000_000)
    launched = site.launch(2, 1, "--restarts=0", *site.flags(workdir, **endless))
    with ended(launched):
        assert launched.stderr is not None
        pids: dict[str, str] = {}
        while len(pids) < 2:
            pids |= dict(re.findall(r"process (\d) is (\d+)", launched.stderr.readline()))
        wait_for(lambda: n_lines(workdir) > 3, launched)
        os.kill(int(pids["1"]), signal.SIGTERM)
        out, err = launched.communicate(timeout=PATIENCE_SECONDS)
    assert launched.returncode == 128 + signal.SIGTERM, err
    assert err.count("ended with status 143") == 2
    stopped = int(re.findall(r"stopped by a signal and saved step (\d+); go on with the same command", out)[0])
    last = stopped + 4
    finish(site.launch(2, 1, *site.flags(workdir, train__max_iters=last, train__eval_interval=1_000_000)))
    finish(site.start(2, *site.flags(undisturbed, train__max_iters=last, train__eval_interval=1_000_000)))
    assert losses(workdir) == losses(undisturbed)
    assert same(state(workdir, last), state(undisturbed, last))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_other(site: Site, victim: int) -> None:
    workdir = site.folder / f"lost{victim}"
    endless = dict(train__max_iters=1_000_000, train__eval_interval=1_000_000)
    members = site.join(2, *site.flags(workdir, **endless))
    with ended(*members):
        wait_for(lambda: n_lines(workdir) > 3, members[0])
        members[victim].kill()
        _, err = members[1 - victim].communicate(timeout=HEARTBEAT_SECONDS + 60)  # the rest is a slow machine's
    assert members[1 - victim].returncode in (distributed.LOST_STATUS, -signal.SIGABRT)
    assert re.search("lost another process|another task died", err)


def test_killed_processes_are_started_again_and_end_as_if_nothing_had_happened(site: Site, one: Path) -> None:
    workdir, undisturbed = site.folder / "killed", site.folder / "not_killed"
    long = dict(train__max_iters=160, train__eval_interval=40)
    launched = site.launch(2, 1, "--restarts=5", *site.flags(workdir, **long))
    with ended(launched):
        assert launched.stderr is not None
        for victim, kill_after in ((1, 20), (0, 60)):
            pids: dict[str, str] = {}
            while len(pids) < 2:
                pids |= dict(re.findall(r"process (\d) is (\d+)", launched.stderr.readline()))
            wait_for(lambda lines=kill_after: n_lines(workdir) > lines, launched)
            os.kill(int(pids[str(victim)]), signal.SIGKILL)
        _, err = launched.communicate(timeout=PATIENCE_SECONDS)
    assert launched.returncode == 0, err
    assert "starting again (2 of 5)" in err
    finish(site.start(2, *site.flags(undisturbed, **long)))
    assert losses(workdir) == losses(undisturbed)
    assert same(state(workdir, 160), state(undisturbed, 160))


def test_two_runs_in_one_workdir(site: Site) -> None:
    workdir = site.folder / "shared"
    first = site.start(1, *site.flags(workdir, train__max_iters=1_000_000, train__eval_interval=1_000_000))
    with ended(first):
        wait_for(lambda: n_lines(workdir) > 0, first)
        launched = site.launch(2, 1, "--restarts=3", *site.flags(workdir, train__max_iters=8))
        _, err = finish(launched, status=2)
        assert f"error: process {first.pid} on {socket.gethostname()} is training in {workdir}; wait for it" in err
        assert "Traceback" not in err
        assert "starting again" not in err, "a mistake is not repeated"
        assert first.poll() is None


# ----------------------------------------------------------------------------------------------------- what is missing


MISTAKES = {  # flags -> how the message begins
    "--distributed": "--distributed: found none of Slurm (srun), Open MPI (mpirun), GKE and Cloud TPU; elsewhere, give",
    "--coordinator_address=localhost:9": "--num_processes, --process_id missing: give all three of",
    "--coordinator_address=localhost --num_processes=2 --process_id=0": "--coordinator_address=localhost is not HOST:",
    "--coordinator_address=localhost:9 --num_processes=2 --process_id=2": "--process_id=2 does not fit --num_processes",
    "--coordinator_address=localhost:9 --num_processes=2 --process_id=1 --initialization_timeout_seconds=3":
        "no process 0 answers at --coordinator_address=localhost:9 ([Errno 111] Connection refused); start every",
    "--coordinator_address=localhost:PORT --num_processes=2 --process_id=0 --initialization_timeout_seconds=3":
        "process 0 waited at localhost:PORT and not all of --num_processes have come; start every process with",
}  # fmt: skip


def test_a_wrong_environment_is_one_line_and_status_2(site: Site, tmp_path: Path) -> None:
    port = str(free_port())
    base = [f"--config={ROOT / 'configs' / 'base.py'}", f"--workdir={tmp_path / 'run'}"]
    started = {flags: site.start(1, *base, *flags.replace("PORT", port).split()) for flags in MISTAKES}
    partial = site.start(1, *base, "--distributed", SLURM_JOB_ID="7", SLURM_NTASKS="2")
    with ended(partial, *started.values()):
        for flags, process in started.items():
            out, err = finish(process, status=2)
            assert err.startswith("error: " + MISTAKES[flags].replace("PORT", port)), err
            assert (out, err.count("\n")) == ("", 1), err
        _, err = finish(partial, status=2)
    assert "of Slurm's variables SLURM_STEP_NODELIST, SLURM_PROCID, SLURM_LOCALID are missing: start the tasks" in err
    assert not (tmp_path / "run").exists()


def test_a_proxy_does_not_stand_between_the_processes(site: Site, one: Path) -> None:
    """JAX's connection would go through it, and wait for a proxy that knows nothing of the coordinator."""
    proxy = f"http://localhost:{free_port()}"
    workdir = site.folder / "proxy"
    flags = site.flags(workdir, train__max_iters=0)
    finish(site.launch(2, 1, *flags, http_proxy=proxy, https_proxy=proxy))


@pytest.mark.parametrize(("key", "values"), [("train__seed", (0, 1)), ("train__backward_dtype", ("auto", "same"))])
def test_processes_must_agree_on_the_configuration(site: Site, key: str, values: tuple[object, object]) -> None:
    address = f"--coordinator_address=localhost:{free_port()}"
    members = [
        site.start(
            1, *site.flags(site.folder / key, **{key: values[i]}), address, "--num_processes=2", f"--process_id={i}"
        )
        for i in range(2)
    ]
    with ended(*members):
        for process in members:
            _, err = finish(process, status=2)
            assert "error: processes [1] have another configuration than process 0; start all of them with the" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--config.train.batch_size=3 --config.mesh.data=2", "a batch of 3 sequences"),  # all of them see it
        ("--config.log.wandb=True --config.log.wandb_project=a/b", "log.wandb=True "),  # the first one alone does
    ],
)
def test_a_mistake_ends_all_processes_with_the_same_line(site: Site, tmp_path: Path, flags: str, message: str) -> None:
    members = site.join(2, *site.flags(tmp_path / "run"), *flags.split())
    with ended(*members):
        lines = [finish(process, status=2)[1].splitlines()[-1] for process in members]
    assert lines[0].startswith(f"error: {message}")
    assert lines[1].removeprefix("error: ").removeprefix("process 0: ") == lines[0].removeprefix("error: ")


# ------------------------------------------------------------------------------------------------- without processes


def test_alone_nothing_is_exchanged() -> None:
    with together():
        pass
    with pytest.raises(UserError, match="mine") as caught, together():
        raise UserError("mine")
    assert not isinstance(caught.value, AgreedError)
    assert Largest()(signal.SIGTERM) == signal.SIGTERM
    assert not is_lost(ValueError("Gloo all-reduce failed"))
    check_mesh(make_mesh(tiny_config().mesh, 8))


def test_a_mesh_must_use_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(UserError, match=r"mesh \{'data': 1, .*\} has no device of processes \[1, 2\]: it takes 1 of 8"):
        check_mesh(make_mesh(tiny_config().mesh, 8))


def test_cpu_devices_are_shared_between_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_PROCID", "SLURM_CPUS_PER_TASK", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert cpu_devices(8, None, None) == 8
    assert cpu_devices(8, "localhost:1", 4) == 2
    assert cpu_devices(2, "127.0.0.1:1", 4) == 1
    assert cpu_devices(8, "node1:1", 4) == 8
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "2")
    assert cpu_devices(8, None, None) == 4
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert cpu_devices(8, None, None) == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert cpu_devices(8, None, None) == 6
