"""Paul Graham's essays, fetched politely from his site; a second run continues where the first one stopped.

python data/graham_char/prepare.py [--max_essays=20] [--input_file=TEXT]
"""

from pathlib import Path

import essays
from absl import flags

from picogpt_jax import cli
from picogpt_jax.text import prepare

INPUT_FILE = cli.DEFINE_path("input_file", None, "UTF-8 text to use instead of fetching the essays.")
OUT_DIR = cli.DEFINE_path("out_dir", str(Path(__file__).resolve().parent), "Folder to write the data set to.")
DELAY_SECONDS = flags.DEFINE_float("delay_seconds", 1.0, "Pause between two requests.", lower_bound=0.0)
MAX_ESSAYS = flags.DEFINE_integer("max_essays", None, "Take the first so many essays; all by default.", lower_bound=1)


def main() -> None:
    """Writes train.bin, val.bin and meta.json, and the fetched pages to essays/."""
    prepare.run_prepare(
        "graham_char",
        OUT_DIR.value,
        INPUT_FILE.value,
        lambda: essays.join_essays(
            essays.fetch_essays(Path(OUT_DIR.value) / "essays", essays.BASE_URL, DELAY_SECONDS.value, MAX_ESSAYS.value)
        ),
        essays.BASE_URL,
    )


if __name__ == "__main__":
    cli.run(main)
