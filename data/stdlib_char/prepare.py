"""The default data set: the sources of the running Python's own standard library. Nothing is downloaded.

python data/stdlib_char/prepare.py
"""

from pathlib import Path

from picogpt_jax import cli
from picogpt_jax.text import prepare

INPUT_FILE = cli.DEFINE_path("input_file", None, "UTF-8 text to use instead of the standard library's sources.")
OUT_DIR = cli.DEFINE_path("out_dir", str(Path(__file__).resolve().parent), "Folder to write the data set to.")


def main() -> None:
    """Writes train.bin, val.bin and meta.json."""
    prepare.run_prepare("stdlib_char", OUT_DIR.value, INPUT_FILE.value, prepare.stdlib_text, prepare.STDLIB_SOURCE)


if __name__ == "__main__":
    cli.run(main)
