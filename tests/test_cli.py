import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

SCRIPT = textwrap.dedent(
    '''
    """A script."""
    import atexit
    import os

    from absl import flags, logging
    from ml_collections import config_flags

    from picogpt_jax import cli
    from picogpt_jax.errors import UserError

    COUNT = flags.DEFINE_integer("count", 1, "How many.")
    CONFIG = config_flags.DEFINE_config_file("config")

    class Noisy:
        def __del__(self):
            raise RuntimeError("Event loop is closed")

    atexit.register(lambda: os.write(2, b"noise at the end" * (COUNT.value == 404)))

    def main():
        if COUNT.value < 0:
            raise UserError(f"--count={COUNT.value} is negative;\\n  give a number >= 0")
        if COUNT.value == 0:
            raise ZeroDivisionError("a defect of ours")
        if COUNT.value == 404:
            Noisy()
            raise UserError("the disk is full")
        logging.info("chatter")
        print("steps", cli.config_sections(CONFIG)["train"]["steps"])

    cli.run(main)
    '''
)

CONFIG = textwrap.dedent(
    """
    from ml_collections import ConfigDict

    def get_config():
        return ConfigDict({"train": {"steps": 3}})
    """
)

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("cli")
    script, config = folder / "script.py", folder / "config.py"
    script.write_text(SCRIPT)
    config.write_text(CONFIG)
    (folder / "broken.py").write_text("def get_config(:")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, script.name, f"--config={config.name}", *arguments]
        return subprocess.run(
            command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
        )

    return run


def test_a_program_that_ends_well_says_nothing_on_stderr(run: Run) -> None:
    done = run("--count=2", "--config.train.steps=4")
    assert (done.returncode, done.stdout, done.stderr) == (0, "steps 4\n", "")


def test_the_user_can_ask_for_the_log(run: Run) -> None:
    done = run("--verbosity=0")
    assert done.returncode == 0
    assert "chatter" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--count=-1"], "error: --count=-1 is negative; give a number >= 0"),
        (["--count=many"], "error: flag --count=many: "),
        (["--cuont=1"], "error: Unknown command line flag 'cuont'. Did you mean: count"),
        (["--config.train.stepz=1"], "error: a --config flag does not fit: 'stepz' Did you mean \"steps\" instead"),
        (["--config.rain.steps=1"], "error: a --config flag does not fit: 'rain' Did you mean \"train\" instead"),
        (["--config.train.steps=many"], "error: flag --config.train.steps=many: "),
        (["--config=missing.py"], "error: --config: Failed loading config file "),
        (["--config=missing.py", "--config.train.steps=1"], "error: a --config flag does not fit: "),
        (["--config=broken.py"], "error: a --config flag does not fit: invalid syntax (broken.py, line 1)"),
        (["stray"], "error: unexpected argument 'stray'; every setting is a flag, --name=value; --help lists them"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(run: Run, arguments: list[str], expected: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(expected)
    assert done.stderr.count("\n") == 1


def test_what_libraries_print_beside_and_after_a_mistake_does_not_bury_it(run: Run) -> None:
    assert run("--count=404").stderr == "error: the disk is full\n"


def test_a_defect_of_ours_keeps_its_traceback(run: Run) -> None:
    done = run("--count=0")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError: a defect of ours" in done.stderr


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_reader_that_leaves_ends_the_program_quietly(tmp_path: Path, is_ours: bool) -> None:
    """As `| head` does; another broken connection is an error like any other."""
    failure = "raise BrokenPipeError('a connection')"
    work = "while True: print('text', flush=True)" if is_ours else failure
    (tmp_path / "script.py").write_text(f"from picogpt_jax import cli\n\ndef main():\n    {work}\n\ncli.run(main)\n")
    command, env = [sys.executable, "script.py"], {"PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=tmp_path, env=env, **pipes) as process:
        assert process.stdout.readline() == ("text\n" if is_ours else "")
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(timeout=60) == (141 if is_ours else 1)
    assert error.endswith("" if is_ours else "BrokenPipeError: a connection\n")
    assert bool(error) is not is_ours


def test_help_explains_every_flag(run: Run) -> None:
    done = run("--help")
    assert "--count" in done.stdout
    assert "How many." in done.stdout
    assert done.stderr == ""
