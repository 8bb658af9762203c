#!/usr/bin/env bash
# Runs an experiment on a slice of Cloud TPUs: creates it, copies the code, runs main.py on every worker, brings the
# report home, deletes the slice. Needs gcloud, logged in; for more than one worker an ssh agent with gcloud's key
# (ssh-add ~/.ssh/google_compute_engine). --dry-run prints every command and runs none.
#
#   launch/tpu_vm.sh VERB --name=NAME --project=PROJECT --zone=ZONE [flags] [--config=FILE --config.key=value ...]
#                    [-- other flags of main.py]
#
# up       all of the below in order, and again from the start after a preemption, until the program ends
# create   ask for the slice by a queued resource and wait until it is ready      --topology [--spot]
# setup    copy the code, install requirements-tpu.txt on all workers             [--copy] [--hf-token]
# run      start main.py on all workers and follow it; ends with its exit code    --topology --workdir --config
# status   the slice's state, and the program's on each worker
# logs     the end of a worker's log                                              [--worker] [--lines]
# stop     end the program on all workers (SIGTERM, and SIGKILL after 120 s: time for a last checkpoint)
# fetch    copy WORKDIR/report to OUT                                             --workdir [--out]
# delete   delete the slice, its disks and the queued resource NAME, nothing else; never a workdir on gs://
#
#   --topology=v5e:8x8        as of --stages=plan; all: launch/topologies.txt
#   --workdir=gs://BUCKET/DIR of the program. `run` on one worker, without --spot, may use that worker's own disk, which
#                             is lost with the slice
#   --config..., -- ...       go to main.py as they are
#   --spot                    cheaper, may be taken away; `up` then asks for a new slice and runs the same command again
#   --restarts=20             how often `up` does so
#   --keep                    `up` leaves the slice when the program has ended well
#   --copy=PATH               also copy this file or folder of the checkout (records, a model); may be repeated
#   --hf-token=FILE           copy this file with a Hugging Face token, for gated weights
#   --out=runs/NAME           where `fetch` puts report/
#   --worker=0 --lines=50     of `logs`; --worker=all
#   --poll=60                 seconds between two looks at the slice
#   --create-flag=FLAG        one more flag for gcloud's create (--service-account=..., --network=...); may be repeated
#   --ssh-flag=FLAG           one more flag for gcloud's ssh and scp (--internal-ip); may be repeated
#
# Exit code of main.py: 0 done; 75 preempted, start me again; anything else stops. run and up end with the same code.
# The program goes on where this script or its connection ends: the same `run` or `up` finds it and follows it.
set -euo pipefail
umask 077
root=$(cd "$(dirname "$0")/.." && pwd)
PREEMPTED=75 # EX_TEMPFAIL

say() { echo "$(date +%H:%M:%S) $*" >&2; }

usage_error() {
    echo "error: $* (launch/tpu_vm.sh help)" >&2
    exit 2
}

# The only ways out of this script: a command is run, or under --dry-run printed, quoted so that a shell reads it back.
run_command() {
    if [ -n "$dry_run" ]; then
        printf '%q' "$1"
        printf ' %q' "${@:2}"
        echo
    else
        "$@"
    fi
}

on_workers() { # WORKERS TEXT: a shell command on the workers
    run_command gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "${ssh_flags[@]}" "--worker=$1" "--command=$2"
}

# --- the slice

# NONE, WAITING (on its way in or out), READY, LOST (preempted: only deleting is left), STOPPED (by its user, who may
# want its disk) or FAILED. Fails where gcloud gives no answer: without one nothing is created or deleted.
slice_state() {
    local answer
    answer=$(describe queued-resources 'state.state') || return 1
    case $answer in
    NONE | FAILED) echo "$answer" ;;
    SUSPENDED) echo LOST ;;
    ACTIVE)
        answer=$(describe tpu-vm state) || return 1
        case $answer in
        READY | STOPPED) echo "$answer" ;;
        NONE | PREEMPTED | TERMINATED) echo LOST ;;
        *) echo WAITING ;;
        esac
        ;;
    *) echo WAITING ;;
    esac
}

describe() { # KIND FIELD: a field, or NONE where gcloud says that the thing does not exist
    local answer errors
    errors=$(mktemp)
    if answer=$(gcloud compute tpus "$1" describe "$name" "${where[@]}" "--format=value($2)" 2>"$errors"); then
        rm "$errors"
        echo "$answer"
    elif grep -q NOT_FOUND "$errors"; then
        rm "$errors"
        echo NONE
    else
        cat "$errors" >&2
        rm "$errors"
        return 1
    fi
}

request() {
    run_command gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${where[@]}" \
        "--accelerator-type=$accelerator" "--runtime-version=$runtime" "${create_flags[@]}"
}

create() {
    local state last="" failures=0
    if [ -n "$dry_run" ]; then
        request
        echo "# every $poll s, until ACTIVE and READY:"
        run_command gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
        run_command gcloud compute tpus tpu-vm describe "$name" "${where[@]}" '--format=value(state)'
        return
    fi
    while :; do
        if ! state=$(slice_state); then
            failures=$((failures + 1))
            say "$name: no answer from Google Cloud ($failures of 10)"
            if [ "$failures" -ge 10 ]; then
                echo "error: no answer from Google Cloud. The request for $name, once made, still exists, and costs" \
                    "money when it is granted. Go on: the same command. End: $end_command" >&2
                return 1
            fi
            sleep "$poll"
            continue
        fi
        failures=0
        [ "$state" = "$last" ] || say "$name: $state"
        last=$state
        case $state in
        READY) return 0 ;;
        NONE) request || return 1 ;;
        LOST) delete || return 1 ;;
        FAILED)
            echo "error: Google Cloud refused the request for $name. Why:" \
                "gcloud compute tpus queued-resources describe $name ${where[*]}." \
                "Then: $end_command" >&2
            return 1
            ;;
        STOPPED)
            echo "error: $name was stopped, not by this script; it is left as it is. Go on:" \
                "gcloud compute tpus tpu-vm start $name ${where[*]}, then the same command. End: $end_command" >&2
            return 1
            ;;
        esac
        sleep "$poll"
    done
}

delete() {
    run_command gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

# --- the program

setup() {
    local folder=/tmp/kd_jax result=0
    [ -n "$dry_run" ] || folder=$(mktemp -d)
    copy_code "$folder" && on_workers all 'bash tpu_worker.sh setup' || result=$?
    [ -n "$dry_run" ] || rm -r "$folder"
    return "$result"
}

copy_code() { # FOLDER for the archive, which holds only what the program needs: no runs, no records but --copy's
    local files=(main.py attacks configs kd_jax launch requirements.txt "${copies[@]}")
    if [ -n "$hf_token" ]; then
        run_command cp "$hf_token" "$1/hf_token" || return 1
        files+=(-C "$1" hf_token)
    fi
    run_command env COPYFILE_DISABLE=1 tar -czf "$1/kd_jax.tgz" --exclude=__pycache__ -C "$root" "${files[@]}" ||
        return 1
    run_command gcloud compute tpus tpu-vm scp "$1/kd_jax.tgz" "$root/launch/tpu_worker.sh" "$name:" \
        "${where[@]}" "${ssh_flags[@]}" --worker=all
}

run() {
    # One string for the shell of the worker, quoted word by word: nothing in a setting is read as shell.
    on_workers all "bash tpu_worker.sh start$(printf ' %q' "${program[@]}")" || return "$(lost_or 1)"
    if [ -n "$dry_run" ]; then
        echo "# every $poll s, until all $hosts have ended:"
        on_workers all 'bash tpu_worker.sh status'
        return
    fi
    say "$name: running on $hosts worker(s); it goes on if this script ends"
    follow
}

lost_or() { # CODE: 75 where the slice is gone or going, else CODE
    local state
    if [ -z "$dry_run" ] && state=$(slice_state) && [ "$state" != READY ]; then
        echo "$PREEMPTED"
    else
        echo "$1"
    fi
}

# Polls until every worker has ended and returns the program's code. One worker that failed leaves the others waiting in
# a collective: they are stopped after some polls.
follow() {
    local report failures=0 leaving=0 running ended
    while :; do
        if report=$(on_workers all 'bash tpu_worker.sh status' | sed -n 's/^kd_jax worker //p' | sort) &&
            [ "$(grep -c . <<<"$report")" -eq "$hosts" ]; then
            failures=0
            running=$(grep -c '^[^ ]* running' <<<"$report" || true)
            ended=$(sed -nE 's/^[^ ]+ exit ([0-9]+) .*/\1/p; s/^[^ ]+ (gone|idle) .*/'$PREEMPTED'/p' <<<"$report")
            say "$running of $hosts running; ${report%%$'\n'*}"
            if [ "$running" -eq 0 ]; then
                program_code "$ended" || return
                return 0
            fi
            if grep -qv '^0*$' <<<"$ended"; then
                leaving=$((leaving + 1))
                [ "$leaving" -lt 5 ] || on_workers all 'bash tpu_worker.sh stop' || true
            fi
        else
            [ "$(lost_or 0)" -eq 0 ] || return "$PREEMPTED"
            failures=$((failures + 1))
            if [ "$failures" -ge 10 ]; then
                echo "error: no answer from the workers of $name; the program may still be running" >&2
                return 1
            fi
        fi
        sleep "$poll"
    done
}

program_code() { # CODES, one a line: 75 if any has it; else 0, or the lowest (a cause, before the signals it led to)
    local worst
    worst=$(sort -n <<<"$1" | awk '$1 != 0 {print $1; exit}')
    if [ -z "$worst" ]; then
        return 0
    elif grep -qx "$PREEMPTED" <<<"$1"; then
        return "$PREEMPTED"
    fi
    return "$(lost_or "$worst")"
}

status() {
    run_command gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
    on_workers all 'bash tpu_worker.sh status'
}

logs() { on_workers "$worker" "bash tpu_worker.sh logs $lines"; }

stop() { on_workers all 'bash tpu_worker.sh stop'; }

fetch() {
    run_command mkdir -p "$out" || return 1
    case $workdir in
    gs://*) run_command gcloud storage cp --recursive "${workdir%/}/report" "$out" "--project=$project" ;;
    *)
        local remote=$workdir
        [ "${remote#/}" != "$remote" ] || remote="kd_jax/$remote"
        run_command gcloud compute tpus tpu-vm scp --recurse "$name:${remote%/}/report" "$out" "${where[@]}" \
            "${ssh_flags[@]}" --worker=0
        ;;
    esac
}

up() {
    local restarts=0 code
    while :; do
        create || return 1
        code=0
        if setup; then run || code=$?; else code=$(lost_or 1); fi
        [ "$code" -eq "$PREEMPTED" ] || break
        if [ "$restarts" -ge "$max_restarts" ]; then
            echo "error: preempted $((restarts + 1)) times; --restarts=$max_restarts" >&2
            break
        fi
        restarts=$((restarts + 1))
        say "$name: preempted; restart $restarts of at most $max_restarts"
        sleep "$poll"
    done
    if [ "$code" -eq 0 ]; then
        fetch || say "warning: no report came to $out; all that the program wrote is in $workdir"
        if [ -z "$keep" ]; then
            delete && return
            code=1
        fi
    fi
    [ -n "$dry_run" ] || say "$name still exists and costs money. Look:" \
        "launch/tpu_vm.sh logs --name=$name ${where[*]}. End: $end_command"
    return "$code"
}

# --- the command line

read_flags() {
    name="" project="" zone="" topology="" workdir="" config="" out="" dry_run="" keep="" spot=""
    hf_token="" max_restarts=20 worker=0 lines=50 poll=60
    create_flags=(--quiet) ssh_flags=(--quiet) copies=(requirements-tpu.txt) overrides=()
    while [ $# -gt 0 ]; do
        case $1 in
        --name=*) name=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --topology=*) topology=${1#*=} ;;
        --workdir=*) workdir=${1#*=} ;;
        --config=*) config=${1#*=} ;;
        --config.*) overrides+=("$1") ;;
        --spot) spot=yes create_flags+=(--spot) ;;
        --restarts=*) max_restarts=${1#*=} ;;
        --keep) keep=yes ;;
        --copy=*) copies+=("${1#*=}") ;;
        --hf-token=*) hf_token=${1#*=} ;;
        --out=*) out=${1#*=} ;;
        --worker=*) worker=${1#*=} ;;
        --lines=*) lines=${1#*=} ;;
        --poll=*) poll=${1#*=} ;;
        --create-flag=*) create_flags+=("${1#*=}") ;;
        --ssh-flag=*) ssh_flags+=("${1#*=}") ;;
        --dry-run) dry_run=yes ;;
        --)
            shift
            overrides+=("$@")
            break
            ;;
        *) usage_error "unknown flag $1; flags of main.py other than --config go after --" ;;
        esac
        shift
    done
    where=("--project=$project" "--zone=$zone")
    end_command="launch/tpu_vm.sh delete --name=$name ${where[*]}"
    out=${out:-runs/$name}
    program=("--config=$config" "--workdir=$workdir" ${overrides[@]+"${overrides[@]}"})
}

matches() { # FLAG VALUE PATTERN
    [ -n "$2" ] || usage_error "$1 is missing"
    [[ $2 =~ ^$3$ ]] || usage_error "$1=$2: not a valid value"
}

check_flags() { # VERB
    matches --name "$name" '[a-z]([-a-z0-9]{0,47}[a-z0-9])?'
    matches --project "$project" '[a-z][-a-z0-9.:]*[a-z0-9]'
    matches --zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]'
    matches --restarts "$max_restarts" '[0-9]+'
    matches --lines "$lines" '[0-9]+'
    matches --poll "$poll" '[0-9]+'
    matches --worker "$worker" '([0-9]+|all)'
    local path
    for path in "${copies[@]:1}"; do
        case /$path/ in
        //* | */../* | /-*) usage_error "--copy=$path: a path inside the checkout, relative to it" ;;
        esac
        [ -e "$root/$path" ] || usage_error "--copy=$path: no such file in $root"
    done
    [ -z "$hf_token" ] || [ -f "$hf_token" ] || usage_error "--hf-token=$hf_token: no such file"
    case $1 in create | run | up) read_topology ;; esac
    case $1 in run | up | fetch) [ -n "$workdir" ] || usage_error "--workdir is missing" ;; esac
    case $1 in create | run | up) check_workdir "$1" ;; esac
    case $1 in
    run | up)
        [ -n "$config" ] || usage_error "--config is missing"
        [ -f "$root/${config%%:*}" ] || usage_error "--config=$config: no such file in $root"
        ;;
    esac
}

check_workdir() { # VERB
    local why=""
    [ "$1" != up ] || why="up deletes the slice, and with it what is on its disk"
    [ -z "$spot" ] || why="a spot slice is taken away with what is on its disk"
    [ "$hosts" -eq 1 ] || why="$topology has $hosts workers, which share the work directory"
    case $workdir in
    "" | gs://?*) ;;
    *) [ -z "$why" ] || usage_error "--workdir=$workdir: $why; give gs://BUCKET/DIR" ;;
    esac
}

read_topology() {
    [ -n "$topology" ] || usage_error "--topology is missing, for example --topology=v5e:8x8"
    local table=$root/launch/topologies.txt row
    row=$(awk -v topology="$topology" '$1 == topology' "$table")
    [ -n "$row" ] || usage_error "--topology=$topology: known are$(awk '!/^#/ {printf " %s", $1}' "$table")"
    read -r _ accelerator hosts _ runtime _ <<<"$row"
}

main() {
    local verb=${1:-help}
    case $verb in
    help | -h | --help)
        sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
        return
        ;;
    up | create | setup | run | status | logs | stop | fetch | delete) ;;
    *) usage_error "unknown verb $verb" ;;
    esac
    read_flags "${@:2}"
    check_flags "$verb"
    if [ -z "$dry_run" ] && ! command -v gcloud >/dev/null; then
        usage_error "gcloud is not on the PATH: install the Google Cloud CLI and run gcloud auth login"
    fi
    "$verb"
}

main "$@"
