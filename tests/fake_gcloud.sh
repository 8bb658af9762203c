#!/usr/bin/env bash
# Plays gcloud for tests/test_launch.py, on the folder $CLOUD: `calls`, one quoted line a call; `state`, of the queued
# resource; `node`, of its machines; `answers`, - for each time that it is silent; `bucket`, what lies on gs://; `w0`,
# `w1`, ..., the workers' homes, on which ssh really runs the command and scp really copies.
set -euo pipefail
printf '%q ' "$@" >>"$CLOUD/calls"
echo >>"$CLOUD/calls"
state=$(cat "$CLOUD/state" 2>/dev/null || true)
value() { # FLAG of the call
    local prefix=$1 argument
    for argument in "${arguments[@]}"; do
        if [[ $argument == "$prefix"=* ]]; then echo "${argument#*=}"; fi
    done
}
arguments=("$@")
case "$1 ${2:-} ${3:-} ${4:-}" in
"compute tpus queued-resources create")
    [ -z "$state" ] || { echo "ERROR: ALREADY_EXISTS" >&2 && exit 1; }
    echo "${CREATED_STATE:-ACTIVE}" >"$CLOUD/state"
    for ((i = 0; i < WORKERS; i++)); do
        mkdir -p "$CLOUD/w$i/kd_jax/.venv/bin" # an environment that needs no installing
        printf '#!/bin/sh\nexec %q -I -S "$@"\n' "$REAL_PYTHON" >"$CLOUD/w$i/kd_jax/.venv/bin/python"
        chmod +x "$CLOUD/w$i/kd_jax/.venv/bin/python"
        touch "$CLOUD/w$i/kd_jax/.venv/bin/activate"
        printf 'numpy\njax[tpu]\n' >"$CLOUD/w$i/kd_jax/.venv/.installed-requirements-tpu.txt"
    done
    ;;
"compute tpus queued-resources describe")
    [ -z "${DENIED:-}" ] || { echo "ERROR: PERMISSION_DENIED" >&2 && exit 1; }
    answers=$(cat "$CLOUD/answers" 2>/dev/null || true)
    printf '%s' "${answers:1}" >"$CLOUD/answers"
    [ "${answers:0:1}" != - ] || { echo "ERROR: UNAVAILABLE" >&2 && exit 1; }
    [ -n "$state" ] || { echo "ERROR: NOT_FOUND: Resource was not found." >&2 && exit 1; }
    echo "$state"
    ;;
"compute tpus tpu-vm describe") cat "$CLOUD/node" 2>/dev/null || echo READY ;;
"compute tpus queued-resources delete")
    for pid in "$CLOUD"/w*/kd_jax/log/pid; do # a machine takes its programs with it
        [ ! -f "$pid" ] || kill -KILL -- "-$(cat "$pid")" 2>/dev/null || true
    done
    rm -r "$CLOUD/state" "$CLOUD"/w*
    ;;
"compute tpus tpu-vm ssh")
    [ "$state" = ACTIVE ] || exit 255
    result=0
    for ((i = 0; i < WORKERS; i++)); do
        (cd "$CLOUD/w$i" && HOME=$CLOUD/w$i WORKER=w$i bash -c "$(value --command)") || result=$?
    done
    exit "$result"
    ;;
"compute tpus tpu-vm scp")
    [ "$state" = ACTIVE ] || exit 255
    for ((i = 0; i < WORKERS; i++)); do cp "$5" "$6" "$CLOUD/w$i/"; done
    ;;
"storage cp "*)
    [ -d "$CLOUD/bucket/report" ] || { echo "ERROR: The following URLs matched no objects or files" >&2 && exit 1; }
    cp -r "$CLOUD/bucket/report" "$5/"
    ;;
*) exit 64 ;;
esac
