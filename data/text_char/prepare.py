"""Any UTF-8 text of your own, character by character, or by the tokens of a model that is to be trained further.

python data/text_char/prepare.py --input_file=book.txt --out_dir=data/book_char
python data/text_char/prepare.py --input_file=book.txt --out_dir=data/book_gpt2 --vocabulary=runs/gpt2/vocab.json
"""

from pathlib import Path

from picogpt_jax import cli
from picogpt_jax.text import prepare

INPUT_FILE = cli.DEFINE_path("input_file", None, "The UTF-8 text.")
OUT_DIR = cli.DEFINE_path("out_dir", str(Path(__file__).resolve().parent), "Folder to write the data set to.")

VOCABULARY = cli.DEFINE_path("vocabulary", None, "vocab.json of a model to train further. Default: the text's own.")


def main() -> None:
    """Writes train.bin, val.bin and meta.json."""
    prepare.run_prepare("text_char", OUT_DIR.value, INPUT_FILE.value, vocabulary_file=VOCABULARY.value)


if __name__ == "__main__":
    cli.run(main)
