"""Several processes, one program: joining them, agreeing on what one of them alone knows, leaving when one is lost.

Every process runs the same program on devices of its own, and a step is computed by all of them together. What a
process finds by itself (a missing file, a signal) has to become known to all, or the others would wait for it forever.
"""

import contextlib
import hashlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from picogpt_jax.errors import UserError

LOST_STATUS = 75  # EX_TEMPFAIL: another process was lost; starting all of them again helps
HEARTBEAT_TIMEOUT_SECONDS = 100
INITIALIZATION_TIMEOUT_SECONDS = 45
_MESSAGE_BYTES = 2048
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # what gRPC, and so JAX's coordination service, looks at
# What the errors of a lost connection have in common, from gloo, NCCL, gRPC and Orbax's barriers.
_LOST = ("gloo", "nccl", "connection", "unavailable", "deadline_exceeded", "barrier", "coordination", "cancelled")


class AgreedError(UserError):
    """A user's mistake that every process has learned of: all of them leave, and none has to be given up."""


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout_seconds: int = HEARTBEAT_TIMEOUT_SECONDS,
    initialization_timeout_seconds: int = INITIALIZATION_TIMEOUT_SECONDS,
) -> None:
    """Joins this process to the others; must run before anything else touches JAX.

    Args:
        coordinator_address: "host:port" of process 0; with the next two, or none of the three: JAX then asks Slurm,
            Open MPI, GKE or Cloud TPU.
        heartbeat_timeout_seconds: a process that has been silent for so long is lost, and ends all the others.
        initialization_timeout_seconds: the time for all processes to come together.

    Raises:
        UserError: something is missing or does not fit. Where the others do not come in time, the program ends with one
            line and status 2 (from a thread: JAX itself waits in C++, and would abort).
    """
    _check_arguments(coordinator_address, num_processes, process_id)
    for name, seconds in (("heartbeat", heartbeat_timeout_seconds), ("initialization", initialization_timeout_seconds)):
        if seconds < 1:
            raise UserError(f"--{name}_timeout_seconds={seconds} is not positive")
    # A signal is the training's to handle (train.StopSignal); JAX's own service would swallow every SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_check_proxy_envs", False)
    if coordinator_address is not None:  # gRPC would ask a proxy for the way to it
        names = ("no_grpc_proxy", "no_proxy")  # it reads the second where the first is not set
        host = coordinator_address.rsplit(":", 1)[0]
        os.environ[names[0]] = ",".join(filter(None, [*map(os.environ.get, names), host]))
    arrived = threading.Event()
    late = threading.Timer(initialization_timeout_seconds, _give_up, (arrived, coordinator_address, process_id))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if coordinator_address is not None else None,
            initialization_timeout=initialization_timeout_seconds + 30,  # the timer comes first
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            shutdown_timeout_seconds=heartbeat_timeout_seconds,
        )
    except (ValueError, RuntimeError, KeyError, OSError, TypeError) as error:
        raise UserError(_why_not(error)) from error
    finally:
        arrived.set()
        late.cancel()


def _check_arguments(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if coordinator_address is None or num_processes is None or process_id is None:
        if len(missing) == len(given):
            return
        raise UserError(
            f"{', '.join(missing)} missing: give all three of {', '.join(given)}, or none of them under Slurm, "
            "Open MPI, GKE and Cloud TPU"
        )
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"--coordinator_address={coordinator_address} is not HOST:PORT of process 0, e.g. node1:8476")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} does not fit --num_processes={num_processes}; "
            "expected a number from 0 to num_processes - 1"
        )
    try:
        socket.getaddrinfo(host, int(port))
    except OSError as error:
        raise UserError(f"--coordinator_address={coordinator_address}: {host} is not known here ({error})") from None


def _give_up(arrived: threading.Event, coordinator_address: str | None, process_id: int | None) -> None:
    """Ends the program with what can be found out about the processes that did not come."""
    if arrived.is_set():
        return
    proxies = [name for name in _PROXIES if os.environ.get(name)]
    # Where a cluster names the processes, those that are not here yet may come with the next start.
    status = LOST_STATUS if coordinator_address is None else 2
    if coordinator_address is None:
        reason = (
            f"the processes that {_cluster() or 'the cluster'} names have not come together; see the others' output"
        )
        if proxies:
            reason += f", or unset {', '.join(proxies)} (or put the coordinator's host into no_proxy)"
    elif process_id == 0:
        reason = f"process 0 waited at {coordinator_address} and not all of --num_processes have come"
    else:
        reason = _reachable(coordinator_address)
    _leave(f"{reason}; start every process with the same address, or raise --initialization_timeout_seconds", status)


def _reachable(address: str) -> str:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        return f"no process 0 answers at --coordinator_address={address} ({error})"
    return f"process 0 answers at {address}, but not all of --num_processes have come"


def _why_not(error: Exception) -> str:
    reason = " ".join(str(error).split())
    if not isinstance(error, ValueError) or "defined" not in reason:
        where = _cluster()
        return f"--distributed: {f'found {where}, but ' if where else ''}JAX cannot join the processes: {reason[:500]}"
    message = "--distributed: found none of Slurm (srun), Open MPI (mpirun), GKE and Cloud TPU"
    absent = [name for name in _SLURM if name not in os.environ]
    if 0 < len(absent) < len(_SLURM):
        message += f"; of Slurm's variables {', '.join(absent)} are missing: start the tasks with srun"
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        message += "; in Kubernetes, pip install 'jax[k8s]' and start the pods as a JobSet or an indexed Job"
    return f"{message}; elsewhere, give --coordinator_address=HOST:PORT --num_processes=N --process_id=I"


def _cluster() -> str | None:
    """The environment that JAX takes its addresses from, in its order."""
    signs = {"Open MPI": "OMPI_MCA_orte_hnp_uri", "Slurm": _SLURM[0], "Kubernetes": "KUBERNETES_SERVICE_HOST"}
    return next((name for name, variable in signs.items() if variable in os.environ), None)


def cpu_devices(cores: int, coordinator_address: str | None, num_processes: int | None) -> int:
    """How many CPU devices a process makes that shares its machine with others, of `cores` it may run on.

    Slurm says how many are a task's own, Open MPI how many processes there are here; processes with a coordinator on
    this machine are taken to be all here, and others to be alone. JAX_NUM_CPU_DEVICES overrides it.
    """
    if "SLURM_PROCID" in os.environ and coordinator_address is None:
        return min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", 1)))
    here = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
    if coordinator_address is not None and num_processes is not None:
        is_local = coordinator_address.rsplit(":", 1)[0] in ("localhost", "127.0.0.1", "[::1]")
        here = num_processes if is_local else 1
    return max(1, cores // here)


def is_first() -> bool:
    """Whether this process writes what is written once: logs, config.json, the terminal."""
    return jax.process_index() == 0


def check_mesh(mesh: Mesh) -> None:
    """Refuses a mesh that leaves a process without a device.

    Raises:
        UserError: naming the processes.
    """
    idle = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if idle:
        raise UserError(
            f"mesh {dict(mesh.shape)} has no device of processes {sorted(idle)}: it takes {mesh.size} of "
            f"{jax.device_count()} devices; choose mesh.* and train.batch_size so that all are used, or fewer processes"
        )


def _exchange(text: str) -> list[str]:
    """The texts of all processes, by process; cut at 2,047 bytes."""
    buffer = np.zeros(_MESSAGE_BYTES, np.uint8)
    encoded = np.frombuffer(text.encode()[: _MESSAGE_BYTES - 1], np.uint8)
    buffer[: len(encoded)] = encoded
    rows = np.asarray(multihost_utils.process_allgather(buffer)).reshape(jax.process_count(), -1)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that each process runs by itself: a `UserError` in one of them is raised in all, after the block.

    Nothing inside may wait for another process.

    Raises:
        AgreedError: with the message of the process that failed.
    """
    mistake: UserError | None = None
    try:
        yield
    except UserError as error:
        if jax.process_count() == 1:
            raise
        mistake = error
    if jax.process_count() == 1:
        return
    messages = _exchange(str(mistake) if mistake else "")
    if mistake:
        raise AgreedError(str(mistake)) from mistake
    failed = [f"process {index}: {message}" for index, message in enumerate(messages) if message]
    if failed:
        raise AgreedError("; ".join(failed))


def require_same(what: str, text: str) -> None:
    """Checks that every process was given the same `text`.

    Raises:
        AgreedError: naming the processes that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    digests = _exchange(hashlib.sha256(text.encode()).hexdigest())
    others = [index for index, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise AgreedError(f"processes {others} have another {what} than process 0; start all of them with the same")


class Largest:
    """The largest of the processes' numbers, which all of them learn at the same call: the one after.

    Not at the same call, because the host would have to wait for the device to finish what it is computing.
    """

    def __init__(self) -> None:
        mesh = jax.make_mesh((jax.device_count(),), ("device",), axis_types=(AxisType.Auto,))
        self._place = NamedSharding(mesh, PartitionSpec("device"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._before: jax.Array | None = None

    def __call__(self, number: int) -> int:
        """Takes this process's number (>= 0); returns the largest of the call before, at first 0. Alone: its own."""
        if jax.process_count() == 1:
            return number
        own = np.full(1, number, np.int32)
        numbers = jax.make_array_from_callback((jax.device_count(),), self._place, lambda _: own)
        before, self._before = self._before, self._largest(numbers)
        return 0 if before is None else int(np.asarray(before))


@contextlib.contextmanager
def leave_on_error() -> Iterator[None]:
    """In a run of several processes, an error that only this one knows of ends it at once.

    An ordinary exit would wait for the others, which wait for this one. They notice a closed connection, or a missing
    heartbeat.
    """
    try:
        yield
    except (SystemExit, AgreedError):
        raise
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, UserError):
            _leave(str(error), 2)
        if isinstance(error, KeyboardInterrupt):
            _leave("stopped by a second signal, without saving", 128 + signal.SIGINT)
        if is_lost(error):
            reason = " ".join(str(error).split())[:300]
            _leave(
                f"lost another process ({reason}); see its output. Start all of them again with the same command: "
                "they go on from the last checkpoint",
                LOST_STATUS,
            )
        traceback.print_exc()
        _leave(f"process {jax.process_index()} ends after the {type(error).__name__} above", 1)


def is_lost(error: BaseException) -> bool:
    """Whether an error says that the connection to another process has broken."""
    text = str(error).lower()
    return jax.distributed.is_initialized() and isinstance(error, Exception) and any(sign in text for sign in _LOST)


def _leave(message: str, status: int) -> NoReturn:
    sys.stdout.flush()
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    os._exit(status)
