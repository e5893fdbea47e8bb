# Sourced by quickstart.sh and test.sh from the root of the repository.
#
# prepare_environment EXTRAS: makes .venv with this package, editable, and the extras named (comma-separated), at the
# versions of scripts/constraints.txt. Returns at once where that has been done and neither file has changed since.
# PYTHON names another interpreter than python3. pip's own settings are kept.

prepare_environment() {
  local extras="$1" python="${PYTHON:-python3}" wanted stamp torch
  wanted="$(cat pyproject.toml scripts/constraints.txt | cksum)"
  for stamp in ".venv/.installed-$extras" ".venv/.installed-dev"; do # dev includes what the others need
    if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]] && .venv/bin/python -c "" 2>/dev/null; then
      return
    fi
  done

  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # absent, half-made, or its interpreter has gone
    _require_python "$python"
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv || _stop "'$python -m venv' failed; on Debian and Ubuntu, apt install python3-venv"
  fi
  echo "Installing picogpt_jax[$extras] and what it needs into .venv: once, several minutes"
  torch="$(grep '^torch==' scripts/constraints.txt)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
    -c scripts/constraints.txt "$torch" -e ".[$extras]" || _stop "pip could not install into .venv; see its message above"
  echo "$wanted" >".venv/.installed-$extras"
}

_require_python() {
  local found
  found="$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" ||
    _stop "'$1' does not run; install Python 3.11 to 3.13, or name one: PYTHON=/path/to/python3.12"
  case "$found" in
    3.11 | 3.12 | 3.13) ;;
    *) _stop "'$1' is Python $found; Python 3.11 to 3.13 is needed: name one with PYTHON=/path/to/python3.12" ;;
  esac
}

_stop() {
  echo "error: $1" >&2
  exit 2
}
