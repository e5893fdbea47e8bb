#!/usr/bin/env bash
# From a fresh machine to text out of an int8 model: environment, data without a download, QAT, int8 export, samples.
# It writes to runs/quickstart; running it again goes on from there.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
prepare_environment torch,plot,data

python=.venv/bin/python
run=runs/quickstart
data=data/stdlib_char
step() { printf '\n== %s\n' "$*"; }

step "1. Data: the source code of Python's standard library"
"$python" $data/prepare.py

step "2. Training with int8 in the forward pass (QAT)"
"$python" scripts/train.py --config=configs/stdlib_char.py --workdir=$run

step "3. The int8 model"
"$python" scripts/quantize.py --workdir=$run --output=$run/int8

step "4. Validation loss, 100,000 tokens"
evaluate() { "$python" scripts/evaluate.py --data=$data --max_tokens=100000 "${@:2}" --json=$run/loss_"$1".json >/dev/null; }
evaluate float --model=$run --forward=float
evaluate qat --model=$run --forward=trained
evaluate int8 --model=$run/int8
evaluate torch --model=$run/int8 --runtime=torch
"$python" - $run <<'PY'
import json, pathlib, sys

run = pathlib.Path(sys.argv[1])
print(f"{'model':36}{'nats':>9}{'bits/char':>11}")
rows = {"float": "float parameters", "qat": "QAT forward pass", "int8": "int8 model, JAX", "torch": "int8 model, PyTorch"}
for name, label in rows.items():
    result = json.loads((run / f"loss_{name}.json").read_text())
    print(f"{label:36}{result['loss']:9.5f}{result['bits_per_char']:11.4f}")
PY

step "5. Text from the int8 model in JAX"
sample=(scripts/sample.py --start="def " --max_new_tokens=300 --overflow=refill --show_stats)
"$python" "${sample[@]}" --model=$run/int8 --runtime=jax

step "6. The same text from PyTorch: all is computed in integers"
"$python" "${sample[@]}" --model=$run/int8 --runtime=torch

step "7. What lies in $run"
du -sh $run/checkpoints $run/int8
echo "loss curve: $run/loss.png"
