"""Kills a training again and again, and compares its end with that of one left in peace:

    python scripts/soak.py --data=data/stdlib_char --output=runs/soak --kills=20

For one process and for two, `scripts/launch/local.sh` trains; at a random moment (during the start, a step, an
evaluation, a checkpoint) a random process gets SIGKILL, and the launcher starts all of them again. Parameters,
optimizer state and the losses in metrics.jsonl must be those of an undisturbed run, bit for bit.
"""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from picogpt_jax import cli
from picogpt_jax.config import Config
from picogpt_jax.devices.setup import set_up_jax
from picogpt_jax.errors import UserError
from picogpt_jax.files import write_json
from picogpt_jax.training.metrics import METRICS_FILE, read_metrics

ROOT = Path(__file__).resolve().parent.parent
MODEL = dict(n_layer=1, n_head=2, n_embd=16, block_size=16)
LOG_INTERVAL = 10  # steps
LONGEST_STEPS = 125  # a life ends before it has made more than these ...
LONGEST_SECONDS = 6.0  # ... or, one in five, so long after its start: while JAX starts, reads and compiles
EVENTS_COMPARED = ("step", "split", "loss")

DATA = cli.DEFINE_path("data", "", "Folder with train.bin, val.bin and meta.json.")
OUTPUT = cli.DEFINE_path("output", "", "New folder for the runs and soak.json.")
KILLS = flags.DEFINE_integer("kills", 20, "How often each training is killed.", lower_bound=1)
INTERVAL = flags.DEFINE_integer("eval_interval", 25, "Steps between checkpoints.", lower_bound=10)
SEED = flags.DEFINE_integer("seed", 0, "Of the moments and the victims.")


def main() -> None:
    if not DATA.value or not OUTPUT.value:
        raise UserError("--data and --output are needed, e.g. --data=data/stdlib_char --output=runs/soak")
    output = Path(OUTPUT.value)
    if output.exists():
        raise UserError(f"--output={output} exists; give a new folder")
    moments = random.Random(SEED.value)
    set_up_jax("cpu")
    report: dict[str, Any] = {"steps": steps(), "eval_interval": INTERVAL.value}
    for processes in (1, 2):
        undisturbed, killed = (output / f"{name}{processes}" for name in ("undisturbed", "killed"))
        run_undisturbed(processes, undisturbed)
        lives = run_killed(processes, killed, moments)
        differing = compare(undisturbed, killed)
        report[f"processes_{processes}"] = {**dataclasses.asdict(lives), "differing": differing}
        print(f"{processes} processes: {lives.kills} kills, resumed at {sorted(set(lives.resumed_at))}, ", end="")
        print(f"differing: {differing or 'nothing'}", flush=True)
    write_json(output / "soak.json", report)
    if any(report[f"processes_{processes}"]["differing"] for processes in (1, 2)):
        sys.exit(1)


def steps() -> int:
    """Too many to be finished before the last kill."""
    return (KILLS.value + 1) * LONGEST_STEPS


@dataclasses.dataclass
class Lives:
    """What happened to a training that was killed."""

    kills: int
    victims: list[int]  # process numbers
    seconds: list[float]  # from a start to its kill
    killed_at: list[int]  # the last step in metrics.jsonl then
    resumed_at: list[int]  # the step of each resumed start


def launch(processes: int, workdir: Path, restarts: int) -> subprocess.Popen[str]:
    """Two CPU devices in all, whatever the number of processes."""
    command = ["bash", str(ROOT / "scripts" / "launch" / "local.sh"), str(processes), f"--restarts={restarts}"]
    command += [f"--config={ROOT / 'configs' / 'debug.py'}", f"--workdir={workdir}", "--device=cpu"]
    command += ["--heartbeat_timeout_seconds=10", f"--config.data.dir={Path(DATA.value).absolute()}"]
    command += [f"--config.model.{key}={value}" for key, value in MODEL.items()]
    command += [
        f"--config.train.max_iters={steps()}",
        f"--config.train.eval_interval={INTERVAL.value}",
        f"--config.train.log_interval={LOG_INTERVAL}",
    ]
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "JAX_NUM_CPU_DEVICES": str(2 // processes),
        "JAX_COMPILATION_CACHE_DIR": str(Path(OUTPUT.value).absolute() / "compiled"),
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run_undisturbed(processes: int, workdir: Path) -> None:
    launched = launch(processes, workdir, restarts=0)
    text, _ = launched.communicate()
    if launched.returncode:
        raise UserError(f"the undisturbed training ended with status {launched.returncode}: {text[-1000:]}")


def run_killed(processes: int, workdir: Path, moments: random.Random) -> Lives:
    launched = launch(processes, workdir, restarts=10 * KILLS.value)
    lives = Lives(kills=0, victims=[], seconds=[], killed_at=[], resumed_at=[])
    started = threading.Event()
    members: dict[int, int] = {}  # process number -> pid, of the life at hand
    text: list[str] = []

    def read() -> None:
        assert launched.stdout is not None
        for line in launched.stdout:
            text.append(line)
            if match := re.match(r"local\.sh: process (\d+) is (\d+)", line):
                members[int(match[1])] = int(match[2])
                if len(members) == processes:
                    started.set()
            elif match := re.match(r"resumed .* at step (\d+)", line):
                lives.resumed_at.append(int(match[1]))
        started.set()  # the launcher has ended: nobody waits for a start that does not come

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while lives.kills < KILLS.value:
        started.wait()
        began = time.monotonic()
        if len(members) == processes:
            _let_live(launched, workdir / METRICS_FILE, moments)
        if launched.poll() is not None:
            reader.join()
            raise UserError(f"the training ended after {lives.kills} kills: {''.join(text)[-1000:]}")
        victim = moments.randrange(processes)
        pid = members[victim]
        members.clear()
        started.clear()
        os.kill(pid, signal.SIGKILL)
        lives.kills += 1
        lives.victims.append(victim)
        lives.seconds.append(round(time.monotonic() - began, 2))
        lives.killed_at.append(_last_step(workdir / METRICS_FILE))
    launched.wait()
    reader.join()
    if launched.returncode:
        raise UserError(f"the killed training ended with status {launched.returncode}: {''.join(text)[-1000:]}")
    return lives


def _let_live(launched: subprocess.Popen[str], metrics: Path, moments: random.Random) -> None:
    """Returns at a random moment of a life."""
    if moments.random() < 0.2:
        time.sleep(moments.uniform(0.0, LONGEST_SECONDS))
        return
    before = metrics.stat().st_ino if metrics.exists() else None
    while launched.poll() is None and (not metrics.exists() or metrics.stat().st_ino == before):
        time.sleep(0.01)  # a start writes the file anew
    until = _last_step(metrics) + moments.randrange(LONGEST_STEPS - INTERVAL.value)
    while launched.poll() is None and _last_step(metrics) < until:
        time.sleep(0.01)
    time.sleep(moments.uniform(0.0, 0.5))


def _last_step(metrics: Path) -> int:
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def compare(one: Path, other: Path) -> list[str]:
    """What differs between the ends of two runs: names of arrays, or "metrics.jsonl"."""
    import jax

    from picogpt_jax.training.checkpoint import Checkpoints
    from picogpt_jax.training.trainer import Trainer

    def arrays(workdir: Path) -> dict[str, Any]:
        with Checkpoints(workdir) as checkpoints:
            run = Config.from_dict(checkpoints.meta(steps())["config"])
            state = checkpoints.restore(Trainer(run, jax.devices()[:1]).abstract_state, steps()).state
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}

    def events(workdir: Path) -> list[str]:
        lines = read_metrics(workdir / METRICS_FILE)
        return [json.dumps({key: event[key] for key in EVENTS_COMPARED}) for event in lines]

    first, second = arrays(one), arrays(other)
    differing = sorted(name for name in first.keys() | second.keys() if not _same(first.get(name), second.get(name)))
    return differing + ([] if events(one) == events(other) else [METRICS_FILE])


def _same(one: Any, other: Any) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and one.tobytes() == other.tobytes()


if __name__ == "__main__":
    cli.run(main)
