#!/usr/bin/env bash
# The part of launch_tpu.sh that runs on each VM of the TPU. The run is in ~/coda_run: its log, its
# process, its exit code. Each call answers with one line, '@worker HOST ...', or has failed.
set -euo pipefail
mkdir -p ~/coda_run
cd ~/coda_run
export PATH=$HOME/coda_venv/bin:$HOME/.local/bin:$PATH

answer() { echo "@worker $(hostname) $*"; }

alive() {  # not after a restart of the VM, when another process may have the number
  [ "$(cat boot 2>/dev/null)" = "$(cat /proc/sys/kernel/random/boot_id)" ] && kill -0 "$(cat pid)" 2>/dev/null
}

holders() {  # this user's processes that have a chip open
  local device by=()
  for device in ${LAUNCH_CHIPS:-'/dev/accel*' '/dev/vfio/*'}; do by+=(-o -lname "$device"); done
  find /proc/[0-9]*/fd -user "$(id -un)" \( "${by[@]:1}" \) 2>/dev/null | cut -d/ -f3 | sort -u || true
}

install() {  # EXTRAS PYTHON; the image's own Python is too old
  command -v uv || curl -LsSf https://astral.sh/uv/install.sh | sh || python3 -m pip install --user uv || return
  [ -x ~/coda_venv/bin/python ] || uv venv --python "$2" ~/coda_venv || return
  uv pip install --python ~/coda_venv/bin/python -e "$HOME/coda_jax[$1]"
}

stop() {  # SECONDS: lets the run save and end, then kills what is left of its group
  local i
  alive || return 0
  pkill -TERM -P "$(cat pid)" || true  # not the group: processes that read data serve until it saved
  for ((i = 0; i < 5 * $1; i++)); do
    alive || break
    sleep 0.2
  done
  kill -KILL -- "-$(cat pid)" 2>/dev/null || true
}

free_chips() {
  local i lock=${LAUNCH_LOCKFILE:-/tmp/libtpu_lockfile} found
  for ((i = 0; i < 25; i++)); do
    found=$(holders)
    [ -n "$found" ] || break
    # shellcheck disable=SC2086  # process ids are words
    kill "$([ "$i" = 20 ] && echo -KILL || echo -TERM)" $found 2>/dev/null || true
    sleep 0.2
  done
  [ ! -O "$lock" ] || rm -f "$lock"  # a killed process leaves it, and it keeps others from the chips
}

start() {  # COMMAND...
  stop 60
  free_chips
  rm -f code stopped
  cat /proc/sys/kernel/random/boot_id >boot
  echo "=== $(date): $*" >>log
  cd ~/coda_jax
  # shellcheck disable=SC2016  # the inner shell expands it
  nohup setsid bash -c 'trap : TERM; "$@"; echo $? >"$0/code.new"; mv "$0/code.new" "$0/code"' \
    ~/coda_run "$@" >>~/coda_run/log 2>&1 </dev/null &
  echo $! >~/coda_run/pid
}

state() {
  if [ -e stopped ]; then echo stopped
  elif [ -s code ]; then echo "ended $(cat code)"
  elif [ ! -e pid ]; then echo none
  elif alive; then echo running
  elif [ -s code ]; then echo "ended $(cat code)"  # between the two looks
  else echo lost; fi
}

what=$1
shift
case $what in
  install)
    if install "$@" >install.log 2>&1; then answer installed; else
      tail -n 5 install.log | sed "s/^/[$(hostname)] /"
    fi ;;
  start) start "$@" && answer started ;;
  state) answer "$(state)" ;;
  stop) touch stopped && stop "$1" && answer stopped "$(cat code 2>/dev/null || true)" ;;
  log) tail -n "$1" log | sed "s/^/[$(hostname)] /" && answer log ;;
  follow) tail -n "$1" -F log | sed -u "s/^/[$(hostname)] /" ;;
esac
