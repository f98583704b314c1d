#!/usr/bin/env bash
# t5like job mine on TPU VMs: v5p-512 in us-east5-b, reserved
#
#   bash FILE           create the TPU VMs, wait for them, run, create them again after a preemption, delete them
#   bash FILE attach    supervise the job again, if this script ended without deleting the TPU VMs
#   bash FILE delete    delete the TPU VMs
#
# Ctrl-C, SIGTERM and SIGHUP stop the run, which saves a checkpoint, and delete the TPU VMs; a second one deletes
# them at once. Exit codes: 0 done; 75 the time limit is over and the run has saved; 76 the restarts are used up;
# 2, 3, 4, 5, 70 the run failed and would fail again.
set -u

name=mine
place=(
    --zone=us-east5-b
    --project=my-project
    --quiet
)
request=(
    --accelerator-type=v5p-512
    --runtime-version=v2-alpha-tpuv5
    --node-id=mine
    --reserved
    --service-account=trainer@my-project.iam.gserviceaccount.com
    --scopes=https://www.googleapis.com/auth/cloud-platform
    --valid-until-duration=86400s
)
nodes=(
    mine
)
runs=(
    /mnt/runs/mine
)
wheel=''
time_limit=86400  # seconds of running; 0: none
wait_limit=86400  # seconds that a request waits for machines
grace=120  # seconds between SIGTERM and SIGKILL
retries=10  # after a lost process or machine; preemptions do not count

# ---- What every worker runs -------------------------------------------------------------------------------------------
worker_script() {
    cat <<'END_OF_WORKER_SCRIPT'
name=mine
grace=120
environment() {
    export PYTHONUNBUFFERED=1
    export JAX_COMPILATION_CACHE_DIR=/mnt/runs/cache
    export XLA_FLAGS='--xla_dump_to=/tmp/it'"'"'s here'
    HF_TOKEN=$(gcloud secrets versions access latest --secret=hf-token --project=my-project) || fail 2 'the secret hf-token can'"'"'t be read; the service account of the TPU VMs needs access to it'
    export HF_TOKEN
}
prepare() {
    mountpoint -q /mnt/runs || { sudo mkdir -p /mnt/runs && sudo gcsfuse --implicit-dirs --rename-dir-limit=1000000 --file-mode=666 --dir-mode=777 -o allow_other my-bucket /mnt/runs; } ||
        fail 4 'gs://my-bucket could not be mounted with gcsfuse'
    sudo docker pull --quiet registry.example/my-project/images/t5like:1.0 ||  # a private image of the cloud's own registry needs the login of the service account
        { sudo gcloud auth configure-docker registry.example --quiet && sudo docker pull --quiet registry.example/my-project/images/t5like:1.0; } ||
        fail 2 'the image can not be pulled'
    sudo docker rm --force "$name" >/dev/null 2>&1  # of a start that was killed
}
select_run() {
    case "$1" in
    0)
        command=(
            sudo
            --preserve-env=PYTHONUNBUFFERED,JAX_COMPILATION_CACHE_DIR,XLA_FLAGS,HF_TOKEN
            docker
            run
            --rm
            --name=mine
            --privileged
            --network=host
            --env=PYTHONUNBUFFERED
            --env=JAX_COMPILATION_CACHE_DIR
            --env=XLA_FLAGS
            --env=HF_TOKEN
            --volume=/mnt/runs:/mnt/runs
            registry.example/my-project/images/t5like:1.0
            python3
            -m
            t5like
            train
            --config=t5_small
            --workdir=/mnt/runs/mine
        )
        workdir=/mnt/runs/mine
        ;;
    esac
    logs="$workdir/logs"
}
terminate() { sudo docker stop --time="$grace" "$name" >/dev/null; }
kill_all() { sudo docker rm --force "$name" >/dev/null 2>&1; pkill -KILL -s "$(cat pid)"; }
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
END_OF_WORKER_SCRIPT
}
# ---- Supervision ----------------------------------------------------------------------------------------------------
poll=30          # seconds between two looks at the state of the request
patience=600     # seconds without a connection after which machines count as lost
most_stalled=10  # restarts in sequence without a newer checkpoint
lost=250 preempted=251 deleted=252
scratch=$(mktemp -d) || exit 2
exec </dev/null
mine=no running=no connected=no hurry='' known_state=''

say() { echo "t5like launch: $*"; }
message() { grep -m 1 ERROR "$scratch/error" || tail -n 1 "$scratch/error"; }  # of gcloud, one line
queued() { gcloud compute tpus queued-resources "$1" "$name" "${place[@]}" "${@:2}"; }
on() {  # NODE WORKER COMMAND
    gcloud compute tpus tpu-vm ssh "$1" "${place[@]}" --worker="$2" \
        --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4 --command="$3"
}
# bash runs a trap between commands only: whatever takes long is a background process that is waited for.
long() { "$@" & wait $!; }
everywhere() {  # runs a command on all workers of all slices at once
    local node pid pids=() failed=0
    for node in "${nodes[@]}"; do
        on "$node" all "$1" 2>>"$scratch/ssh" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        wait "$pid" || failed=1
        [ -z "$hurry" ] || break
    done
    return "$failed"
}
worker() { everywhere "bash t5like/$name/worker.sh $*"; }
ask() { long on "${nodes[0]}" 0 "bash t5like/$name/worker.sh $*" 2>>"$scratch/ssh" >"$scratch/reply"; }
look() {  # sets state, as gcloud names it; DELETED if there is no such request, empty if there is no reply
    if long queued describe --format='value(state.state)' >"$scratch/state" 2>"$scratch/error"; then
        state=$(cat "$scratch/state")
    elif grep -qi 'not.found' "$scratch/error"; then
        state=DELETED
    else
        state=
    fi
    if [ "$state" != "$known_state" ] && [ "$state" != DELETED ]; then
        say "$name is ${state:-not reachable: $(message)}"
    fi
    known_state=$state
}

look_at_machines() {  # fails with what happened to them if they are gone
    local node
    look
    case "$state" in
    SUSPENDING | SUSPENDED | FAILED) return "$preempted" ;;
    DELETED) return "$deleted" ;;
    esac
    for node in "${nodes[@]}"; do
        long gcloud compute tpus tpu-vm describe "$node" "${place[@]}" --format='value(state)' \
            >"$scratch/state" 2>/dev/null
        case "$(cat "$scratch/state")" in PREEMPTED | TERMINATED | STOPP*) return "$preempted" ;; esac
    done
}

create() {
    say "requesting $name: ${request[*]}"
    mine=yes
    if ! long queued create "${request[@]}" 2>"$scratch/error"; then
        grep -qi 'already.exists' "$scratch/error" && mine=no
        say "$name was refused: $(message)"
        grep -Eqi 'quota|RESOURCE_EXHAUSTED' "$scratch/error" &&
            say "ask for quota of this kind in this zone, or use another --zone, a smaller --accelerator or --spot"
        return 1
    fi
    say "$name was accepted"
}
wait_until_active() {
    local since=$SECONDS
    while :; do
        look
        case "$state" in
        ACTIVE) return 0 ;;
        FAILED)
            long queued describe --format='value(state.failedData.error.message)' >"$scratch/error" 2>/dev/null
            say "$name failed: $(tail -n 1 "$scratch/error")"
            return 2
            ;;
        SUSPENDING | SUSPENDED) return "$preempted" ;;
        DELETED) return "$deleted" ;;
        esac
        if [ $((SECONDS - since)) -ge "$wait_limit" ]; then
            say "$name got no machines in $wait_limit seconds"
            return 2
        fi
        long sleep "$poll"
    done
}
upload() {  # the worker's script, and the wheel if there is one
    local node
    everywhere "mkdir -p t5like/$name && cd t5like/$name && cat >worker.new <<'END_OF_UPLOAD' && mv worker.new worker.sh
$(worker_script)
END_OF_UPLOAD" || return 1
    if [ -n "$wheel" ]; then
        for node in "${nodes[@]}"; do
            long gcloud compute tpus tpu-vm scp "$wheel" "$node:t5like/$name/" "${place[@]}" --worker=all || return 1
        done
    fi
}
obtain() {  # machines that are ready; creates them again until they are, or ends the script
    local new=$1
    while :; do
        if [ "$new" = yes ]; then create || exit 2; fi
        wait_until_active
        case $? in
        0)
            if upload; then
                connected=yes
                return
            fi
            look_at_machines
            if [ "$state" = ACTIVE ] && [ "$connected" = no ]; then
                say "there is no connection to $name: $(grep ERROR "$scratch/ssh" | tail -n 1)"
                exit 2
            fi
            ;;
        "$deleted") say "$name was deleted by another command"; mine=no; exit 143 ;;
        2) if [ "$restarts" = 0 ]; then exit 2; else exit 75; fi ;;
        esac
        count_restart "$name was lost before it was ready"
        remove || exit 76
        new=yes
    done
}
remove() {
    local tries=0
    [ "$mine" = yes ] || return 0
    say "deleting $name"
    while ! long queued delete --force >/dev/null 2>"$scratch/error"; do
        grep -qi 'not.found' "$scratch/error" && break
        tries=$((tries + 1))
        if [ "$tries" -ge 5 ]; then
            say "$name COULD NOT BE DELETED and costs money: $(message)"
            say "delete it with: gcloud compute tpus queued-resources delete $name --force ${place[*]}"
            return 1
        fi
        long sleep "$poll"
    done
    known_state=
    mine=no
}
clean_up() {
    local code=$?
    trap 'hurry=yes' INT TERM HUP
    if [ "$running" = yes ] && [ "$code" -gt 128 ]; then
        say "stopping the run: it saves a checkpoint in at most $grace seconds"
        worker stop
    fi
    trap '' INT TERM HUP
    for pid in $(jobs -p); do pkill -P "$pid"; kill "$pid"; done 2>/dev/null
    remove || code=76
    rm -rf "$scratch"
    trap - EXIT
    say "ended with exit code $code"
    exit "$code"
}

# ---- One run: started again until it is done, fails for good, or no longer makes progress ---------------------------
count_restart() {
    stalled=$((stalled + 1))
    say "restart $((restarts += 1)): $1"
    if [ "$stalled" -gt "$most_stalled" ]; then
        say "$most_stalled restarts without a new checkpoint; not started again"
        exit 76
    fi
}
count_failure() {
    failures=$((failures + 1))
    if [ "$failures" -gt "$retries" ]; then
        say "$1; --retries=$retries are used up"
        exit 76
    fi
    count_restart "$1"
}
follow() {  # prints the log of worker 0 from where it was left, and reads from it whether the run made progress
    local step
    { on "${nodes[0]}" 0 "bash t5like/$name/worker.sh follow $seen" 2>>"$scratch/ssh" | tee "$scratch/log"; } &
    wait $!
    seen=$((seen + $(wc -c <"$scratch/log")))
    step=$(sed -n 's/^t5like launch: .*; newest checkpoint: \([0-9][0-9]*\)$/\1/p' "$scratch/log" | tail -n 1)
    if [ "${step:--1}" -gt "$newest" ]; then
        newest=$step
        stalled=0
    fi
}
outcome() {  # the exit code of all workers: a failure first, then a lost process, a preemption, success
    local codes code kind
    worker result >"$scratch/codes" || return "$lost"
    codes=$(sed -n 's/^code \([0-9][0-9]*\)$/\1/p' "$scratch/codes" | sort -n)
    for kind in failed lost preempted; do
        for code in $codes; do
            case "$kind $code" in
            lost\ 76 | lost\ 12[89] | lost\ 1[3-9][0-9] | lost\ 2[0-9][0-9] | preempted\ 75) return "$code" ;;
            *\ 0 | *\ 75 | *\ 76 | *\ 12[89] | *\ 1[3-9][0-9] | *\ 2[0-9][0-9]) ;;
            failed\ *) return "$code" ;;
            esac
        done
    done
    return 0
}
attempt() {  # starts run $1 and follows it; returns its exit code, or that its machines are gone
    local left=0 silent_since=
    if [ "$time_limit" -gt 0 ]; then
        left=$((deadline - SECONDS))
        if [ "$left" -le 0 ]; then return 75; fi
    fi
    if worker start "$1" "$left"; then
        running=yes
        while :; do
            follow
            if ask status && [ -s "$scratch/reply" ]; then
                silent_since=
                if ! grep -q running "$scratch/reply"; then
                    outcome
                    return
                fi
                long sleep "$((poll / 10))"
                continue
            fi
            look_at_machines || return
            : "${silent_since:=$SECONDS}"
            if [ $((SECONDS - silent_since)) -ge "$patience" ]; then return "$lost"; fi
            long sleep "$poll"
        done
    fi
    look_at_machines || return
    return "$lost"
}
train() {  # run $1 until it ends; returns its exit code
    local code
    newest=-1 stalled=0 failures=0
    while :; do
        attempt "$1"
        code=$?
        running=no
        case "$code" in
        0) say "${runs[$1]} is done"; return 0 ;;
        75)
            if [ "$time_limit" -gt 0 ] && [ "$SECONDS" -ge "$deadline" ]; then
                say "the time limit of $time_limit seconds is over; the same job continues ${runs[$1]}"
                exit 75
            fi
            count_restart "the run was preempted and has saved"
            ;;
        "$deleted") say "$name was deleted by another command"; mine=no; exit 143 ;;
        "$preempted" | "$lost")
            if [ "$code" = "$lost" ]; then
                count_failure "$name does not reply: $(tail -n 1 "$scratch/ssh")"
            else
                count_restart "$name was preempted"
            fi
            remove || exit 76
            obtain yes
            seen=0
            ;;
        76 | 12[89] | 1[3-9][0-9] | 2[0-9][0-9]) count_failure "a process was lost (exit code $code)" ;;
        *)
            say "${runs[$1]} ended with exit code $code, and would again; not started again"
            return "$code"
            ;;
        esac
    done
}

trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
restarts=0 stalled=0 failures=0 seen=0 first=0 result=0
# gcloud takes the key from an agent, if there is one, and refuses several workers if the agent does not have it.
[ -n "${SSH_AUTH_SOCK:-}" ] && ssh-add -q "$HOME/.ssh/google_compute_engine" 2>/dev/null
look
case "${1:-}" in
attach)
    if [ "$state" = DELETED ]; then say "there is no $name to attach to"; exit 2; fi
    mine=yes
    obtain no
    if ask current; then first=$(cat "$scratch/reply"); fi
    ;;
delete)
    mine=yes
    exit 0
    ;;
*)
    if [ "$state" != DELETED ]; then
        if [ -n "$state" ]; then
            say "$name exists; use 'bash $0 attach', 'bash $0 delete' or another --name"
        else
            say "gcloud can't look up $name: $(tr -s '[:space:]' ' ' <"$scratch/error"); nothing was requested"
        fi
        exit 2
    fi
    known_state=
    obtain yes
    ;;
esac
deadline=$((SECONDS + time_limit))
for ((index = first; index < ${#runs[@]}; index++)); do
    train "$index"
    code=$?
    if [ "$result" = 0 ]; then result=$code; fi
done
exit "$result"
