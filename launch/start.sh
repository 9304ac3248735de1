# shellcheck shell=bash
# What every launcher shares: options, the device's environment, torchrun. Sourced, never run.

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
per_node="" # processes on this node; empty: one per visible device
restarts=0
overrides=() # what goes to the pipeline

# shellcheck disable=SC2034 # every launcher's usage() prints it
common_options='Options of every launcher:
  --nproc-per-node N   processes on this node; default: one per visible device, one on a CPU
  --max-restarts N     start all processes again up to N times when one fails; they resume (default 0)
  --help               this text
Everything else is passed to the pipeline unchanged: device=npu run=mine distill.tokens=1000000
DRY_RUN=1 prints the torchrun command instead of running it.'

fail() {
    echo "error: $*" >&2
    exit 2
}

# Take the options of every launcher from the arguments and keep the rest for the pipeline. Needs usage().
read_options() {
    while (($#)); do
        case $1 in
            --help | -h) usage && exit 0 ;;
            --nproc-per-node) per_node=${2:-} && shift ;;
            --nproc-per-node=*) per_node=${1#*=} ;;
            --max-restarts) restarts=${2:-} && shift ;;
            --max-restarts=*) restarts=${1#*=} ;;
            --) shift && overrides+=("$@") && break ;;
            *) overrides+=("$1") ;;
        esac
        shift || fail "the last option has no value"
    done
    [[ $restarts =~ ^[0-9]+$ ]] || fail "--max-restarts is '$restarts', not a number"
    [[ -z $per_node || $per_node =~ ^[1-9][0-9]*$ ]] || fail "--nproc-per-node is '$per_node', not a positive number"
}

# The device the pipeline will use: its own override where there is one, else what this machine has.
device_kind() {
    local kind=auto override
    for override in ${overrides[@]+"${overrides[@]}"}; do
        case $override in device=* | device.kind=*) kind=${override#*=} ;; esac
    done
    if [[ $kind == auto ]]; then
        if [[ -e /dev/davinci_manager ]]; then
            kind=npu
        elif [[ -e /dev/nvidiactl ]]; then
            kind=cuda
        else
            kind=cpu
        fi
    fi
    echo "$kind"
}

count_list() {
    tr ',' '\n' <<<"$1" | grep -c . || true
}

visible_devices() {
    case $1 in
        npu)
            if [[ -n ${ASCEND_RT_VISIBLE_DEVICES:-} ]]; then
                count_list "$ASCEND_RT_VISIBLE_DEVICES"
            else
                find /dev -maxdepth 1 -name 'davinci[0-9]*' | wc -l
            fi
            ;;
        cuda)
            if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
                count_list "$CUDA_VISIBLE_DEVICES"
            else
                nvidia-smi --list-gpus | wc -l
            fi
            ;;
        cpu) echo 1 ;;
    esac
}

# Run the pipeline under torchrun; the arguments are torchrun's rendezvous options.
start() {
    local kind
    kind=$(device_kind)
    case $kind in
        npu | cuda)
            # shellcheck source=/dev/null
            source "$launch/env/$kind.sh"
            # said out loud, so that a machine whose accelerator cannot be used stops instead of taking the CPU
            [[ " ${overrides[*]-} " == *" device="* || " ${overrides[*]-} " == *" device.kind="* ]] ||
                overrides+=("device=$kind")
            ;;
        cpu) ;;
        *) fail "device is '$kind'; choose npu, cuda, cpu or auto" ;;
    esac
    [[ -n $per_node ]] || per_node=$(visible_devices "$kind")
    ((per_node > 0)) || fail "no $kind device is visible here; check the driver, or give --nproc-per-node"

    # Schedulers set these for another purpose (a node's rank, a list of devices); torchrun sets them for each process.
    unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT
    unset "${!PET_@}"

    local command=(torchrun "$@" --nproc-per-node "$per_node" --max-restarts "$restarts" -m pipeline)
    command+=(${overrides[@]+"${overrides[@]}"})
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "${command[@]}" && echo
        return
    fi
    command -v torchrun >/dev/null || fail "torchrun is not on PATH; activate the environment the pipeline is installed in"
    exec "${command[@]}"
}

# Run this node's part of a job over several nodes: its rank, their number, the first node's address, port, a job name,
# and the address under which the others reach this node: any of them may keep the workers' store, and many machines
# call themselves localhost.
# The rendezvous is c10d's: its store lives on node 0, survives the restart of a worker, and notices a lost node.
start_node() {
    local node=$1 nodes=$2 master=$3 port=$4 job=$5 address=$6 host=false
    [[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "the number of nodes is '$nodes'"
    if [[ ! $node =~ ^[0-9]+$ ]] || ((node >= nodes)); then fail "this node's rank is '$node' of $nodes nodes"; fi
    [[ -n $master ]] || fail "the first node's address is empty"
    if ((nodes == 1)); then
        start --standalone
        return
    fi
    if ((node == 0)); then host=true; fi
    start --nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$master:$port" --rdzv-id "$job" \
        --rdzv-conf "is_host=$host,join_timeout=${JOIN_TIMEOUT:-1800}${RDZV_CONF:+,$RDZV_CONF}" \
        ${address:+--local-addr "$address"}
}
