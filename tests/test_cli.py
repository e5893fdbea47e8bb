import ast
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
    FOLDER = cli.DEFINE_path("folder", "~/default", "Where.")
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
        if COUNT.value == 1 << 60:
            bytes(COUNT.value)
        if COUNT.value == 404:
            Noisy()
            raise UserError("the disk is full")
        logging.info("chatter")
        sections = cli.config_sections(CONFIG)
        if COUNT.value == 3:
            print(FOLDER.value, sections["data"]["dir"])
        print("steps", sections["train"]["steps"])

    cli.run(main)
    '''
)

CONFIG = textwrap.dedent(
    """
    from ml_collections import ConfigDict

    def get_config():
        return ConfigDict({"train": {"steps": 3}, "data": {"dir": "~/data"}})
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

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, script.name, f"--config={config.name}", *arguments]
        env = {"PYTHONPATH": str(ROOT), "HOME": str(folder), **environment}
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)

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
        (["--config=missing.py"], "error: --config=missing.py: No such file or directory in /"),
        (
            ["--config", "missing.py", "--config.train.steps=1"],
            "error: --config=missing.py: No such file or directory ",
        ),
        ([f"--count={1 << 60}"], "error: there is not enough memory ("),
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


def test_a_tilde_in_a_path_is_the_home_folder(run: Run) -> None:
    home = run("--count=3").stdout.split("/default")[0]
    assert Path(home, "script.py").is_file()
    assert run("--config=~/config.py", "--count=3").stdout == f"{home}/default {home}/data\nsteps 3\n"
    assert run("--count=3", "--folder=~/a~b", "--config.data.dir=~/c").stdout == f"{home}/a~b {home}/c\nsteps 3\n"
    assert run("--count=3", "--folder=./~", "--config.data.dir=~c").stdout == "./~ ~c\nsteps 3\n"


@pytest.mark.parametrize("value", ["abc", "0", ""])
def test_a_number_of_devices_that_jax_would_stumble_over_is_named(run: Run, value: str) -> None:
    done = run(JAX_NUM_CPU_DEVICES=value)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: JAX_NUM_CPU_DEVICES={value!r} is not a number of CPU devices; set it to ")
    assert done.stderr.count("\n") == 1


def start(folder: Path, work: str, **options: Any) -> subprocess.Popen[str]:
    """A script whose main is the lines `work`."""
    main = textwrap.indent(textwrap.dedent(work), "    ")
    text = f"import sys\nfrom picogpt_jax import cli\nfrom picogpt_jax.errors import UserError\ndef main():\n{main}\n"
    (folder / "script.py").write_text(text + "cli.run(main)\n")
    env = {"PYTHONPATH": str(ROOT), **options.pop("env", {})}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
    return subprocess.Popen([sys.executable, "script.py"], cwd=folder, env=env, text=True, **pipes)


@pytest.mark.parametrize(
    ("encoding", "expected"), [("ascii", "na?ve ?"), ("latin-1", "na?ve ?"), ("utf-8", "naïve 🙂")]
)
def test_what_the_output_cannot_encode_is_replaced(tmp_path: Path, encoding: str, expected: str) -> None:
    process = start(
        tmp_path, "print('naïve 🙂')", env={"PYTHONIOENCODING": encoding}, encoding="utf-8", errors="replace"
    )
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert out.replace("\ufffd", "?") == f"{expected}\n"  # latin-1 has the ï


AN_ENDLESS_TEXT = """
    try:
        while True:
            print("text", flush=True)
    except OSError:
        raise UserError("cannot write to the workdir")
"""


@pytest.mark.parametrize("stderr", [subprocess.PIPE, subprocess.STDOUT])
def test_a_reader_that_leaves_ends_the_program_quietly(tmp_path: Path, stderr: int) -> None:
    """As `| head` does; nobody takes it for an error of one of his files."""
    with start(tmp_path, AN_ENDLESS_TEXT, stderr=stderr) as process:
        assert process.stdout.readline() == "text\n"
        process.stdout.close()
        assert process.stderr is None or process.stderr.read() == ""
        assert process.wait(timeout=60) == 141


@pytest.mark.parametrize("work", [AN_ENDLESS_TEXT, "print('written when the program ends')"])
def test_a_full_output_is_named(tmp_path: Path, work: str) -> None:
    with Path("/dev/full").open("w") as full, start(tmp_path, work, stdout=full) as process:
        error = process.communicate(timeout=60)[1]
    assert (process.returncode, error) == (
        2,
        "error: cannot write to the standard output: No space left on device; send it elsewhere\n",
    )


def test_another_broken_connection_is_an_error_like_any_other(tmp_path: Path) -> None:
    with start(tmp_path, "raise BrokenPipeError('a connection')") as process:
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert error.endswith("BrokenPipeError: a connection\n")


def test_help_explains_every_flag(run: Run) -> None:
    done = run("--help")
    assert "--count" in done.stdout
    assert "How many." in done.stdout
    assert "--folder: Where." in done.stdout
    assert done.stderr == ""


SCRIPTS = sorted({*ROOT.glob("scripts/*.py"), *ROOT.glob("data/*/prepare.py")})
NO_PATHS = {"start", "topology", "coordinator_address"}  # a string flag is a text or a path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_flag_for_a_path_is_defined_as_one(script: Path) -> None:
    """So that a `~` in front is the home folder."""
    calls = [node for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    strings = {ast.literal_eval(node.args[0]) for node in calls if ast.unparse(node.func) == "flags.DEFINE_string"}
    assert strings <= NO_PATHS
