#!/usr/bin/env bash
# Runs a command again until it succeeds, at most 10 times, 10 seconds apart. Run it on every machine:
#   WORKER_HOSTS="host0 host1" WORKER_INDEX=0 docs/cluster/supervise.sh docs/cluster/with_tf_config.sh \
#       python -m x3d_tf.train --gin_file=... --workdir=...
#
# If a worker dies, all others exit with an error. Each loop then starts its own worker again. Ctrl-C and SIGTERM stop
# the command and end the loop.
set -uo pipefail

stopped=false
child=""
# shellcheck disable=SC2329 # called by trap
stop() {
    stopped=true
    [[ -z $child ]] || kill -TERM "$child" 2>/dev/null
}
trap stop INT TERM

for attempt in {1..10}; do
    "$@" &
    child=$!
    wait "$child"
    status=$?
    while kill -0 "$child" 2>/dev/null; do # a signal interrupts `wait`
        wait "$child"
        status=$?
    done
    if [[ $stopped == true || $status == 0 ]]; then
        exit "$status"
    fi
    echo "supervise.sh: attempt $attempt of 10 ended with status $status" >&2
    child=""
    sleep 10
    [[ $stopped == false ]] || exit 143
done
exit "$status"
