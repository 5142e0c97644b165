#!/usr/bin/env bash
# One machine with GPUs: goes on in the background, again after each stop that saved.
#   pip install -e '.[cuda12]'
#   nohup examples/gpu_box.sh --config=configs/flux.py --workdir=runs/flux >flux.log 2>&1 &
# kill $! saves and ends the run; the same line continues it.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

stopped='' run=''
trap 'stopped=1; kill -TERM "$run" 2>/dev/null' TERM INT
failures=0
while :; do
  "${PYTHON:-.venv/bin/python}" -m coda_jax.train "$@" &
  run=$!
  code=128
  while ((code >= 128)) && kill -0 "$run" 2>/dev/null; do  # a signal ends `wait` before the run ends
    wait "$run"
    code=$?
  done
  [ -z "$stopped" ] || exit "$code"
  case $code in
    0 | 2) exit "$code" ;;
    75) ;;
    *) ((++failures < 3)) || exit "$code" ;;
  esac
  sleep "${PAUSE:-10}"
done
