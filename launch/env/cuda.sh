# shellcheck shell=bash
# Environment of NVIDIA GPUs. Variables that are set already are not changed.

# Teacher and student differ in every width: growing segments instead of fixed ones keep their blocks from fragmenting.
# PyTorch reads either name.
if [[ -z ${PYTORCH_ALLOC_CONF:-} && -z ${PYTORCH_CUDA_ALLOC_CONF:-} ]]; then
    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
fi

# Left alone; set them where they are needed:
#   CUDA_VISIBLE_DEVICES=0,1      use some of the GPUs
#   NCCL_SOCKET_IFNAME=eth0       the network card of NCCL's set-up traffic, where the first one is wrong
#   NCCL_DEBUG=INFO               what NCCL does
