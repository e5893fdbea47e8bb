#!/usr/bin/env bash
# Trains with N processes on this machine; the flags after N are those of scripts/train.py.
#
#   bash scripts/launch/local.sh 2 --config=configs/debug.py --workdir=runs/debug
#   bash scripts/launch/local.sh 2 --restarts=5 --config=configs/debug.py --workdir=runs/debug
#
# When one process fails the others are ended too: they have GRACE_SECONDS (30) to do so themselves. With --restarts=K
# all are started again, at most K times, but not after status 2 (a mistake in the command). On SIGTERM and Ctrl-C all
# save and end. The cores are divided between the processes; JAX_NUM_CPU_DEVICES sets the devices of each.
set -uo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[[ -x "$python" || -n "${PYTHON:-}" ]] || python=python3
if [[ ! "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: the first argument is the number of processes: local.sh 2 --config=FILE --workdir=DIR" >&2
  exit 2
fi
n="$1" restarts=0 stopped=0 flags=()
shift
for flag in "$@"; do
  case "$flag" in
    --restarts=*) restarts="${flag#*=}" ;;
    *) flags+=("$flag") ;;
  esac
done
cores="$(nproc)"
export JAX_NUM_CPU_DEVICES="${JAX_NUM_CPU_DEVICES:-$((cores > n ? cores / n : 1))}"

say() { echo "local.sh: $*" >&2; }

start() { # -> pids
  local port i
  port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')" || exit 2
  pids=()
  for ((i = 0; i < n; i++)); do
    local join=()
    ((n == 1)) || join=("--coordinator_address=localhost:$port" "--num_processes=$n" "--process_id=$i")
    # In a process group of its own: a terminal's Ctrl-C reaches it as one SIGTERM, from here, and it saves.
    set -m
    "$python" "$root/scripts/train.py" "${flags[@]}" "${join[@]}" &
    set +m
    pids+=("$!")
    say "process $i is $!"
  done
}

end_all() { kill "-$1" "${pids[@]}" 2>/dev/null; }

stop() {
  stopped=1
  end_all TERM
}

finish() { # -> status: 0; 2 if any process says so; else the first that is not 0
  local i one deadline=0 left=("${pids[@]}")
  status=0
  while ((${#left[@]})); do
    sleep 0.1
    if ((deadline && SECONDS >= deadline)); then
      say "ending what is left"
      end_all KILL
    fi
    for i in "${!left[@]}"; do
      kill -0 "${left[i]}" 2>/dev/null && continue
      wait "${left[i]}"
      one=$?
      unset "left[i]"
      ((one)) || continue
      say "process $i ended with status $one"
      ((status == 0 || one == 2)) && status="$one"
      ((deadline)) || deadline=$((SECONDS + ${GRACE_SECONDS:-30}))
    done
  done
}

trap stop TERM INT
trap 'end_all KILL' EXIT
for ((attempt = 0; ; attempt++)); do
  start
  finish
  if ((status == 0 || status == 2 || stopped || attempt >= restarts)); then
    exit "$status"
  fi
  say "starting again ($((attempt + 1)) of $restarts)"
done
