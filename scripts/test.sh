#!/usr/bin/env bash
# Every check, the same on a laptop and in CI. Arguments go to pytest, with paths from the root of the repository:
#   bash scripts/test.sh tests/training/test_metrics.py -k resume
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
prepare_environment dev

python=.venv/bin/python
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
# A file is one worker's: its tests share what they compile.
"$python" -m pytest -n auto --maxprocesses=4 --dist loadfile "$@"
