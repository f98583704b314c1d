#!/usr/bin/env bash
# a: as t5like launch local starts it, 2 processes of this machine.
set -u
export PYTHONUNBUFFERED=1
export JAX_PLATFORMS=cpu
export T5LIKE_NUM_PROCESSES=2
export A='x y'
[ -n "${MY_TOKEN+set}" ] || { echo "MY_TOKEN is not set in this shell" >&2; exit 2; }
export MY_TOKEN
ulimit -c 0

stopped=0 pids=()
stop() { stopped=1; kill -TERM ${pids[@]+"${pids[@]}"} 2>/dev/null; }
trap stop INT TERM HUP USR1

# run WORKDIR LOGS COMMAND...: all processes of one run, with restarts; returns its exit code
run() {
  local workdir=$1 logs=$2 failures=0 step before process pid code result
  shift 2
  mkdir -p "$logs" || return 4
  echo "logs in $logs" >&2
  step=$(newest "$workdir")
  while :; do
    T5LIKE_COORDINATOR=127.0.0.1:$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    T5LIKE_RENDEZVOUS_SECRET=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    export T5LIKE_COORDINATOR T5LIKE_RENDEZVOUS_SECRET
    pids=()
    for ((process = 0; process < 2; process++)); do
      T5LIKE_PROCESS_ID=$process "$@" >>"$logs/process-$process.log" 2>&1 </dev/null &
      pids+=($!)
    done
    code=0
    for pid in "${pids[@]}"; do
      wait "$pid"
      while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done  # a signal interrupts wait
      wait "$pid"; result=$?  # bash keeps the exit code
      [ $result -le 128 ] || result=76
      case $code,$result in
        *,0 | 76,75) ;;
        0,* | 75,* | 76,*) code=$result ;;  # an error that would come again stays
      esac
    done
    case $code in 75 | 76) ;; *) return $code ;; esac
    [ $stopped = 0 ] || return $code
    before=$step step=$(newest "$workdir")
    [ $code = 75 ] && [ "$step" != "$before" ] || failures=$((failures + 1))
    [ $failures -le 10 ] || return $code
    echo "exit code $code; starting again from step ${step:-0}" >&2
  done
}

# prints the step of the newest complete checkpoint
newest() {
  cd "$1/checkpoints" 2>/dev/null || return 0
  ls -d [0-9]*/commit_success.txt 2>/dev/null | sort -n | tail -n 1 | tr -dc 0-9
}

run /runs/a /runs/a/logs python3 -m t5like train --config=tiny --workdir=/runs/a --fake_devices=4
