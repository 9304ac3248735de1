#!/usr/bin/env bash
# One node of a SLURM job; srun starts it once per node (see slurm.sbatch).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=start.sh
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"

usage() {
    cat <<END
usage: srun --ntasks-per-node=1 launch/slurm.sh [options] [pipeline overrides]

Reads SLURM_JOB_NODELIST, SLURM_NNODES, SLURM_NODEID, SLURM_JOB_ID and SLURMD_NODENAME. PORT sets the rendezvous port of the first node
(default: 29500 and the last three digits of the job's number, so that two jobs can share a node).

$common_options
END
}

read_options "$@"
for name in SLURM_JOB_NODELIST SLURM_NNODES SLURM_NODEID SLURM_JOB_ID; do
    [[ -n ${!name:-} ]] || fail "$name is not set; start it with srun inside a SLURM job"
done
[[ ${SLURM_NTASKS:-$SLURM_NNODES} == "$SLURM_NNODES" ]] ||
    fail "SLURM started $SLURM_NTASKS tasks on $SLURM_NNODES nodes; use srun --ntasks-per-node=1, torchrun starts the rest"
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=${PORT:-$((29500 + SLURM_JOB_ID % 1000))}
start_node "$SLURM_NODEID" "$SLURM_NNODES" "$master" "$port" "slurm-$SLURM_JOB_ID" "${SLURMD_NODENAME:-}"
