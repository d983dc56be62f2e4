#!/usr/bin/env bash
# Sets TF_CONFIG for one worker of a training run on several machines and runs a command with it:
#   srun --kill-on-bad-exit=1 docs/cluster/with_tf_config.sh python -m x3d_tf.train --gin_file=... --workdir=...
#
# The workers are the machines of a SLURM job with one task each. Without SLURM, WORKER_HOSTS lists them, and
# WORKER_INDEX (in Kubernetes: JOB_COMPLETION_INDEX) is the position of this one, from 0. WORKER_PORT sets the port:
#   WORKER_HOSTS="host0 host1" WORKER_INDEX=0 docs/cluster/with_tf_config.sh python -m x3d_tf.train ...
set -euo pipefail

fail() {
    echo "with_tf_config.sh: $1" >&2
    exit 2
}

(($# > 0)) || fail "a command must follow, such as python -m x3d_tf.train"
if [[ -n ${WORKER_HOSTS:-} ]]; then
    read -ra hosts <<<"$WORKER_HOSTS"
    index=${WORKER_INDEX:-${JOB_COMPLETION_INDEX:-}}
elif [[ -n ${SLURM_JOB_NODELIST:-} ]]; then
    names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    mapfile -t hosts <<<"$names"
    index=${SLURM_PROCID:-}
    ((${SLURM_NTASKS:-0} == ${#hosts[@]})) ||
        fail "SLURM_NTASKS must be ${#hosts[@]}, one task for each machine (--ntasks-per-node=1), got ${SLURM_NTASKS:-}"
else
    fail "WORKER_HOSTS must list the machines outside of SLURM"
fi
if ! [[ $index =~ ^(0|[1-9][0-9]{0,5})$ ]] || ((index >= ${#hosts[@]})); then
    fail "the index of the worker must be in 0..$((${#hosts[@]} - 1)), got '$index'"
fi

port=${WORKER_PORT:-$((12000 + ${SLURM_JOB_ID:-345} % 20000))} # two jobs on a machine need different ports
[[ $port =~ ^[1-9][0-9]{0,4}$ ]] || fail "WORKER_PORT must be a port, got '$port'"
workers=""
for host in "${hosts[@]}"; do
    [[ $host =~ ^[A-Za-z0-9._-]+$ ]] ||
        fail "the name of a machine must have letters, digits, '.', '_' and '-', got '$host'"
    workers+="${workers:+, }\"$host:$port\""
done
export TF_CONFIG="{\"cluster\": {\"worker\": [$workers]}, \"task\": {\"type\": \"worker\", \"index\": $index}}"
exec "$@"
