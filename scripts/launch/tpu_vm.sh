#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU VM slice; the flags are those of scripts/train.py.
#
#   TPU_NAME=mine ZONE=us-west4-a bash scripts/launch/tpu_vm.sh --config=configs/gpt2.py --workdir=/mnt/shared/runs/gpt2
#
# Every host needs the repository at REPOSITORY (default: ~/picogpt_jax, seen from there) with its .venv
# (pip install -e '.[tpu]'), and the data and the workdir on a folder that all hosts share. PROJECT is gcloud's default
# unless given. The command runs on all hosts at once and ends with gcloud's status; Ctrl-C ends gcloud alone, so stop a
# training with TPU_STOP=1, which sends SIGTERM to it on every host: all save at the same step.
set -euo pipefail

for name in TPU_NAME ZONE; do
  if [[ -z "${!name:-}" ]]; then
    echo "error: $name is not set: TPU_NAME=mine ZONE=us-west4-a bash scripts/launch/tpu_vm.sh --config=... --workdir=..." >&2
    exit 2
  fi
done
command -v gcloud >/dev/null || {
  echo "error: gcloud is not installed; see cloud.google.com/sdk" >&2
  exit 2
}

repository="${REPOSITORY:-picogpt_jax}"
if [[ -n "${TPU_STOP:-}" ]]; then
  remote='pkill -TERM -f "^[^ ]*python scripts/train.py --distributed"'
else
  if [[ $# == 0 ]]; then
    echo "error: no flags for scripts/train.py: give --config=FILE --workdir=DIR" >&2
    exit 2
  fi
  printf -v flags ' %q' "$@"
  printf -v folder '%q' "$repository"
  remote="cd $folder && exec .venv/bin/python scripts/train.py --distributed --initialization_timeout_seconds=300$flags"
fi
exec gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} \
  --worker=all --command="$remote"
