#!/bin/bash
# Stands in for `gcloud` on PATH: records its arguments, and plays TPU VMs whose workers are folders of this machine.
#
# The folder $STAND_IN has: calls (the arguments of each call, NUL after each and \1 after the last), state (of the
# request), create (an error that refuses it), states (what the next requests become, one a line; default ACTIVE),
# secrets/NAME, workers (of a slice; default 1), firewall (no worker can be reached), vm/NODE/WORKER (the home of a worker).
cd "$STAND_IN" || exit 9
{ printf '%s\0' "$@"; printf '\1'; } >"call.$$"
cat "call.$$" >>calls  # in one write: several processes call at the same time
rm "call.$$"
words=()
for argument in "$@"; do
    case "$argument" in
    --worker=*) worker=${argument#*=} ;;
    --command=*) command=${argument#*=} ;;
    --format=*) format=${argument#*=} ;;
    --secret=*) secret=${argument#*=} ;;
    --*) ;;
    *) words+=("$argument") ;;
    esac
done
fail() {
    echo "ERROR: (gcloud.compute.tpus) $1" >&2
    exit 1
}
homes() {  # of a node's workers: all, or one
    local last=$(($(cat workers 2>/dev/null || echo 1) - 1)) index
    for index in $(if [ "$2" = all ]; then seq 0 "$last"; else echo "$2"; fi); do
        mkdir -p "vm/$1/$index"
        echo "$PWD/vm/$1/$index"
    done
}
if [ "${words[0]}" = secrets ]; then
    cat "secrets/$secret"
    exit
fi
if [ "${words[3]}" = create ]; then
    [ -f create ] && fail "$(cat create)"
    head -n 1 states 2>/dev/null | grep . >state || echo ACTIVE >state
    [ -f states ] && sed -i 1d states
    exit 0
fi
[ -f unreachable ] && fail "$(cat unreachable)"
[ -f state ] || fail "NOT_FOUND: Resource '${words[4]}' was not found"
case "${words[2]} ${words[3]}" in
'queued-resources describe') case "$format" in *failedData*) echo 'There is no more capacity' ;; *) cat state ;; esac ;;
'queued-resources delete') rm -rf state vm ;;
'tpu-vm describe') echo READY ;;
*)
    [ "$(cat state)" = ACTIVE ] || fail 'the TPU VM is PREEMPTED'
    [ -f firewall ] && fail 'Connection timed out'
    if [ "${words[3]}" = scp ]; then
        node=${words[5]%%:*}
        for home in $(homes "$node" all); do cp "${words[4]}" "$home/${words[5]#*:}"; done
        exit
    fi
    pids=() code=0
    for home in $(homes "${words[4]}" "$worker"); do
        (cd "$home" && HOME=$home exec /bin/sh -c "$command") &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
    exit "$code"
    ;;
esac
