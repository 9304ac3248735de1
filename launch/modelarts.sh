#!/usr/bin/env bash
# One node of a Huawei Cloud ModelArts training job; the boot command of a custom image.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=start.sh
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"

usage() {
    cat <<END
usage: launch/modelarts.sh [options] [pipeline overrides]

Reads MA_NUM_HOSTS (nodes), VC_TASK_INDEX (this node's rank), VC_WORKER_HOSTS (all nodes, the first one keeps the
rendezvous) and MA_NUM_GPUS (devices of a node). PORT sets the rendezvous port (default 29500).

$common_options
END
}

read_options "$@"
nodes=${MA_NUM_HOSTS:-1}
if ((nodes > 1)); then
    for name in VC_TASK_INDEX VC_WORKER_HOSTS; do
        [[ -n ${!name:-} ]] || fail "$name is not set, though MA_NUM_HOSTS is $nodes; start it as a ModelArts training job"
    done
fi
IFS=, read -r -a hosts <<<"${VC_WORKER_HOSTS:-localhost}"
node=${VC_TASK_INDEX:-0}
[[ -n $per_node ]] || per_node=${MA_NUM_GPUS:-}
start_node "$node" "$nodes" "${hosts[0]}" "${PORT:-29500}" "${MA_VJ_NAME:-modelarts}" "${hosts[node]:-}"
