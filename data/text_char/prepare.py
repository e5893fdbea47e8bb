"""Any UTF-8 text of your own, character by character.

python data/text_char/prepare.py --input_file=book.txt --out_dir=data/book_char
"""

from pathlib import Path

from absl import flags

from picogpt_jax import cli, prepare

INPUT_FILE = flags.DEFINE_string("input_file", None, "The UTF-8 text.")
OUT_DIR = flags.DEFINE_string("out_dir", str(Path(__file__).resolve().parent), "Folder to write the data set to.")


def main() -> None:
    """Writes train.bin, val.bin and meta.json."""
    prepare.run_prepare("text_char", OUT_DIR.value, INPUT_FILE.value)


if __name__ == "__main__":
    cli.run(main)
