"""One page about a training: `python scripts/report.py --workdir=runs/debug --output=runs/debug/report.html`."""

import sys
from pathlib import Path

from absl import flags

from picogpt_jax import cli
from picogpt_jax.devices.setup import set_up_jax
from picogpt_jax.errors import UserError
from picogpt_jax.files import atomic_path, check_own_page

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # configs/, whose defaults a run is compared with

WORKDIR = flags.DEFINE_list("workdir", None, "Workdir of scripts/train.py, or several, to compare: RUN,RUN2.")
OUTPUT = cli.DEFINE_path("output", None, "File for the page, HTML.")
START = flags.DEFINE_string("start", None, "Text that the samples continue. Default: a line break.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "Targets of the losses. Default: all of val.bin.", lower_bound=1)
DEVICE = flags.DEFINE_enum("device", "cpu", ["auto", "cpu", "gpu", "tpu"], "Where to compute.")


def main() -> None:
    if not WORKDIR.value or OUTPUT.value is None:
        raise UserError("--workdir and --output are needed, e.g. --workdir=runs/debug --output=runs/debug/report.html")
    set_up_jax(DEVICE.value, cpu_devices=1)
    from configs.base import get_config
    from picogpt_jax.benchmarks import run_page, run_report

    if START.value == "":
        raise UserError("--start is empty; give at least one character")
    check_own_page(OUTPUT.value, run_report.MARK, "report")
    workdirs = run_report.named(WORKDIR.value, run_page.MOST_RUNS)
    histories = [run_report.read_history(workdir, name) for name, workdir in workdirs.items()]
    with atomic_path(OUTPUT.value) as temporary:  # before the minutes of work, which would be for nothing
        runs = []
        for history in histories:
            print(f"{history.name}: losses and samples of its best checkpoint ...", file=sys.stderr)
            runs.append((history, run_report.measure(history, START.value, MAX_TOKENS.value)))
        page = run_page.page(runs, get_config().to_dict()).encode()
        temporary.write_bytes(page)
    print(f"wrote {OUTPUT.value}: {len(page):,} bytes")


if __name__ == "__main__":
    cli.run(main)
