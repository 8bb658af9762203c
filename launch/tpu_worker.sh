#!/usr/bin/env bash
# What tpu_vm.sh asks of each worker of a slice; it is copied there and works in ~/kd_jax. Not for calling by hand.
#   tpu_worker.sh setup            unpack ~/kd_jax.tgz, install requirements-tpu.txt into ~/kd_jax/.venv
#   tpu_worker.sh start ARGS...    start main.py with these arguments in a session of its own; log in ~/kd_jax/log/
#   tpu_worker.sh status | logs N | stop
# `status` prints one line: kd_jax worker HOST (idle | running | gone | exit CODE) | last line of the log
set -euo pipefail
umask 077
home=$HOME/kd_jax
log=$home/log/$(hostname).log
pid=$home/log/pid code=$home/log/code command=$home/log/command stopped=$home/log/stopped

program_state() {
    local alive="" # looked at before the files: a program that ends meanwhile has left its code, and is not "gone"
    # By name too: after a reboot another process may have its number.
    if grep -q main.py "/proc/$(cat "$pid" 2>/dev/null)/cmdline" 2>/dev/null; then alive=yes; fi
    if [ -n "$alive" ] && [ ! -f "$code" ]; then
        echo running
    elif [ -f "$stopped" ]; then
        echo "exit 143" # whatever the program made of the signal: it was stopped on purpose, and is not started again
    elif [ -f "$code" ]; then
        echo "exit $(cat "$code")"
    elif [ -f "$pid" ]; then
        echo gone
    else
        echo idle
    fi
}

find_python() { # 3.11 first: it brings the jax that is tried most on TPUs; the machines' own python3 is 3.10
    local candidate
    for candidate in python3.11 python3.12 python3.13; do
        if command -v "$candidate" && "$candidate" -c 'import ensurepip' 2>/dev/null; then return; fi
    done
    python3 -m pip install --quiet --user uv >&2
    python3 -m uv python install --quiet 3.11 >&2
    python3 -m uv python find 3.11
}

setup() {
    if [ "$(program_state)" = running ]; then
        rm -f kd_jax.tgz
        echo "$(hostname): the program is running; its files stay as they are"
        return
    fi
    mkdir -p "$home/log"
    cd "$home"
    rm -rf attacks configs kd_jax launch main.py # so that a file that is gone from the checkout goes here too
    tar -xzf ../kd_jax.tgz
    rm ../kd_jax.tgz # it may hold records and a token
    PYTHON=$(find_python | tail -n 1)
    # shellcheck source=launch/setup.sh
    . launch/setup.sh
    setup_environment requirements-tpu.txt
    rm -f "$pid" "$code" "$command" "$stopped"
    echo "$(hostname): ready"
}

start() {
    cd "$home"
    local quoted
    quoted=$(printf ' %q' "$@")
    if [ "$(program_state)" = running ]; then
        if [ "$quoted" = "$(cat "$command")" ]; then
            echo "$(hostname): runs already"
            return
        fi
        echo "error: $(hostname) runs another command:$(cat "$command")" >&2
        return 1
    fi
    if [ -f hf_token ]; then export HF_TOKEN_PATH=$home/hf_token; fi
    rm -f "$pid" "$code" "$stopped"
    printf '%s\n' "$quoted" >"$command"
    printf '== %s main.py --distributed%s\n' "$(date -u +%FT%TZ)" "$quoted" >>"$log"
    # The shell that waits must outlive a SIGTERM to write the program's code; a trap that does something, unlike one
    # that ignores, is not inherited by the program.
    # shellcheck disable=SC2016
    setsid bash -c 'trap : TERM HUP
        out=$1 && shift
        .venv/bin/python -u main.py --distributed "$@" && status=0 || status=$?
        echo "$status" >"$out.new" && mv "$out.new" "$out"' main.py "$code" "$@" </dev/null >>"$log" 2>&1 &
    echo $! >"$pid"
    while [ "$(program_state)" = gone ]; do sleep 0.1; done # the new process has not taken its name yet
    echo "$(hostname): started"
}

stop() { # the program saves a checkpoint first: within one step, and the time that the bucket takes
    [ "$(program_state)" = running ] || return 0
    local group seconds
    group=$(cat "$pid")
    touch "$stopped"
    kill -TERM -- "-$group"
    for ((seconds = 0; seconds < ${STOP_SECONDS:-120}; seconds++)); do
        [ "$(program_state)" = running ] || break
        sleep 1
    done
    kill -KILL -- "-$group" 2>/dev/null || true
}

case ${1:-} in
setup | stop) "$1" ;;
start) start "${@:2}" ;;
status)
    last=$(tail -n 1 "$log" 2>/dev/null || true)
    echo "kd_jax worker $(hostname) $(program_state) | ${last:0:160}"
    ;;
logs) tail -n "$2" "$log" ;;
*)
    sed -n '2,6s/^# //p' "$0" >&2
    exit 2
    ;;
esac
