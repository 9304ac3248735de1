# shellcheck shell=bash
# Environment of Ascend NPUs. Variables that are set already are not changed.

# CANN's own variables (ASCEND_HOME_PATH, library paths): torch_npu and DeepSpeed cannot be imported without them.
if [[ -z ${ASCEND_HOME_PATH:-} ]]; then
    for cann in /usr/local/Ascend/cann /usr/local/Ascend/ascend-toolkit "$HOME/Ascend/cann" "$HOME/Ascend/ascend-toolkit"; do
        if [[ -f $cann/set_env.sh ]]; then
            set +u # CANN's script reads variables that may not exist
            # shellcheck source=/dev/null
            source "$cann/set_env.sh"
            set -u
            break
        fi
    done
fi

# Ranks reach their first collective minutes apart when one of them loads or prepares something; HCCL gives up after
# 120 s by itself.
export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-1800}"
# torch_npu's watchdog must outlast HCCL's own limit on one collective, else it reports the wrong cause.
if [[ ${HCCL_EXEC_TIMEOUT:-0} -gt 0 ]]; then
    export HCCL_EVENT_TIMEOUT="${HCCL_EVENT_TIMEOUT:-$((HCCL_EXEC_TIMEOUT + 60))}"
fi
# Teacher and student differ in every width: growing segments instead of fixed ones keep their blocks from fragmenting.
export PYTORCH_NPU_ALLOC_CONF="${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}"
# Prepare and launch operators in two stages of a queue, beside Python: small layers are bound by launching.
export TASK_QUEUE_ENABLE="${TASK_QUEUE_ENABLE:-2}"
# Keep each process on the cores next to its NPU.
export CPU_AFFINITY_CONF="${CPU_AFFINITY_CONF:-1}"

# Left alone; set them where they are needed:
#   ASCEND_RT_VISIBLE_DEVICES=0,1   use some of the NPUs
#   HCCL_SOCKET_IFNAME=eth0         the network card of HCCL's set-up traffic, where the first one is wrong
#   HCCL_IF_BASE_PORT=61000         the first of 32 ports; two jobs on one node need ranges of their own
#   HCCL_DETERMINISTIC=true         sums in a fixed order (device.deterministic=true sets it)
#   ASCEND_LAUNCH_BLOCKING=1        one operator at a time, for a traceback that names the right line; slow
