# The constant end of a worker's script on a TPU VM; launch/tpu_vm_script.py writes the values and functions before it.
# bash worker.sh start RUN SECONDS | follow BYTES | status | result | stop
# start returns at once; the run is a session of its own, so that a lost connection does not end it.
set -u
cd "$(dirname "$0")" || exit 2
alive() { [ -f pid ] && kill -0 "$(cat pid)" 2>/dev/null; }
newest() { (cd "$workdir/checkpoints" 2>/dev/null && printf '%s\n' [0-9]*/commit_success.txt) | grep -Eo '^[0-9]+' | sort -n | tail -n 1; }
fail() {
    echo "t5like launch: $2 ($(hostname))"
    end_with "$1"
}
end_with() {  # the log of this worker stays in the run directory; the exit code is written last
    mkdir -p "$logs" && cp "$here/log" "$logs/$name-$(hostname).log"
    echo "$1" >"$here/exit_code.new" && mv "$here/exit_code.new" "$here/exit_code"
    exit "$1"
}
case "$1" in
start)
    if ! alive; then
        rm -f exit_code child
        echo "$2" >current
        touch log
        setsid nohup bash worker.sh run "$2" "$3" >>log 2>&1 </dev/null &
        echo $! >pid
    fi
    ;;
run)
    here=$PWD
    select_run "$2"
    environment
    prepare
    echo "t5like launch: $(hostname) starts run $2; newest checkpoint: $(newest)"
    "${command[@]}" &
    child=$!
    echo "$child" >"$here/child"
    timer=
    if [ "$3" -gt 0 ]; then
        (sleep "$3"; cd "$here" && terminate; sleep "$grace"; kill_all) &
        timer=$!
    fi
    trap : TERM  # of a machine that shuts down: the command gets it too, and its exit code is still written
    wait "$child"
    code=$?
    while kill -0 "$child" 2>/dev/null; do
        wait "$child"
        code=$?
    done
    [ -n "$timer" ] && kill "$timer"
    end_with "$code"
    ;;
current)
    cat current 2>/dev/null || echo 0
    ;;
follow)
    exec tail -c "+$(($2 + 1))" -s 0.2 -F --pid="$(cat pid)" log 2>/dev/null
    ;;
status)
    if [ -f exit_code ]; then
        echo "ended with code $(cat exit_code)"
    elif alive; then
        echo running
    else
        echo killed
    fi
    ;;
stop)
    if [ -f child ]; then terminate; else kill_all; fi
    bash worker.sh result >/dev/null
    ;;
result)
    waited=0
    while alive && [ "$waited" -lt "$((grace + 30))" ]; do
        sleep 1
        waited=$((waited + 1))
    done
    alive && kill_all
    echo "code $(cat exit_code 2>/dev/null || echo 137)"
    ;;
esac
