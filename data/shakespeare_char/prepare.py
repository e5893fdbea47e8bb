"""Tiny Shakespeare (1.1 MB), downloaded and checked against its SHA-256, or a local copy of it.

python data/shakespeare_char/prepare.py [--input_file=input.txt]
"""

from pathlib import Path

from picogpt_jax import cli
from picogpt_jax.text import download, prepare

INPUT_FILE = cli.DEFINE_path("input_file", None, "UTF-8 text to use instead of the download.")
OUT_DIR = cli.DEFINE_path("out_dir", str(Path(__file__).resolve().parent), "Folder to write the data set to.")


def main() -> None:
    """Writes train.bin, val.bin and meta.json, and input.txt where it was downloaded."""
    prepare.run_prepare(
        "shakespeare_char",
        OUT_DIR.value,
        INPUT_FILE.value,
        lambda: download.shakespeare_text(OUT_DIR.value),
        download.SHAKESPEARE_URL,
    )


if __name__ == "__main__":
    cli.run(main)
