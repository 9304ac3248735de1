#!/usr/bin/env bash
# One pod of an AscendJob (Volcano) or of a Kubeflow PyTorchJob.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=start.sh
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"

usage() {
    cat <<END
usage: launch/kubernetes.sh [options] [pipeline overrides]

AscendJob:  reads MASTER_ADDR, MASTER_PORT, RANK (the rank of the pod), WORLD_SIZE (all NPUs of the job) and
            LOCAL_WORLD_SIZE (NPUs of the pod) or LOCAL_RANK (their list, {0,1,...}).
PyTorchJob: reads MASTER_ADDR, MASTER_PORT, PET_NNODES, PET_NODE_RANK and PET_NPROC_PER_NODE.
JOB_NAME names the rendezvous (default pipeline); POD_IP is the pod's own address.

$common_options
END
}

read_options "$@"
for name in MASTER_ADDR MASTER_PORT RANK WORLD_SIZE; do
    [[ -n ${!name:-} ]] || fail "$name is not set; start it in a pod of an AscendJob or a PyTorchJob"
done
if [[ -n ${PET_NNODES:-} ]]; then
    nodes=$PET_NNODES node=${PET_NODE_RANK:-$RANK}
    [[ -n $per_node || ! ${PET_NPROC_PER_NODE:-} =~ ^[0-9]+$ ]] || per_node=$PET_NPROC_PER_NODE
else
    devices=${LOCAL_WORLD_SIZE:-$(count_list "${LOCAL_RANK:-}")}
    ((devices > 0)) || fail "neither PET_NNODES (PyTorchJob) nor LOCAL_WORLD_SIZE or LOCAL_RANK (AscendJob) is set"
    ((WORLD_SIZE % devices == 0)) || fail "WORLD_SIZE is $WORLD_SIZE, not a multiple of the pod's $devices NPUs"
    nodes=$((WORLD_SIZE / devices)) node=$RANK
    [[ -n $per_node ]] || per_node=$devices
fi
start_node "$node" "$nodes" "$MASTER_ADDR" "$MASTER_PORT" "${JOB_NAME:-pipeline}" "${POD_IP:-}"
