#!/usr/bin/env bash
# Run an image of this folder on this host, with the devices and drivers it needs.
set -euo pipefail

usage() {
    cat <<END
usage: docker/run.sh npu|cuda|cpu [--devices 0,1,...] [--image NAME] [launch options] [pipeline overrides]

The current folder is mounted at /workspace: models and texts are read from it, runs/ and artifacts/ are written to it.
What is fetched from the hub is kept in HF_HOME of this host (default: ~/.cache/huggingface), mounted under its own path.
  --devices 0,1,...   default: all of this host
  --image NAME        default: pangu-light:npu, pangu-light:cuda, pangu-light:cpu
DRY_RUN=1 prints the docker command instead of running it. Launch options: launch/local.sh --help
END
}

fail() {
    echo "error: $*" >&2
    exit 2
}

kind=${1:-}
case $kind in
    npu | cuda | cpu) shift ;;
    --help | -h) usage && exit 0 ;;
    *) usage >&2 && fail "the first argument is '$kind'; choose npu, cuda or cpu" ;;
esac

devices="" image=pangu-light:$kind rest=()
while (($#)); do
    case $1 in
        --devices) devices=${2:-} && shift ;;
        --image) image=${2:-} && shift ;;
        *) rest+=("$1") ;;
    esac
    shift || fail "the last option has no value"
done

# As the calling user, so that what is written belongs to them; that user has no home inside.
flags=(--rm --init --network host --shm-size 64g --user "$(id -u):$(id -g)" --env HOME=/tmp)
# The hub cache under its own path, so that models are fetched once.
export HF_HOME=${HF_HOME:-~/.cache/huggingface}
flags+=(--volume "$PWD:/workspace" --volume "$HF_HOME:$HF_HOME")
# By name alone: values stay out of the command line and of the image.
for name in HF_HOME HF_ENDPOINT HF_TOKEN WANDB_API_KEY WANDB_MODE; do
    if [[ -n ${!name:-} ]]; then flags+=(--env "$name"); fi
done

case $kind in
    npu)
        if [[ -z $devices ]]; then
            devices=$(find /dev -maxdepth 1 -name 'davinci[0-9]*' -printf '%f\n' | sed 's/davinci//' | sort -n | paste -sd,)
            [[ -n $devices ]] || fail "no /dev/davinci* on this host; check the driver with npu-smi info"
        fi
        IFS=, read -r -a numbers <<<"$devices"
        for number in "${numbers[@]}"; do flags+=(--device "/dev/davinci$number"); done
        flags+=(--device /dev/davinci_manager --device /dev/devmm_svm --device /dev/hisi_hdc)
        flags+=(--volume /usr/local/dcmi:/usr/local/dcmi:ro)
        flags+=(--volume /usr/local/bin/npu-smi:/usr/local/bin/npu-smi:ro)
        flags+=(--volume /usr/local/Ascend/driver/lib64:/usr/local/Ascend/driver/lib64:ro)
        flags+=(--volume /usr/local/Ascend/driver/version.info:/usr/local/Ascend/driver/version.info:ro)
        flags+=(--volume /etc/ascend_install.info:/etc/ascend_install.info:ro)
        # the group that may open the devices, where the calling user is not in it
        if [[ -e /dev/davinci_manager ]]; then flags+=(--group-add "$(stat -c %g /dev/davinci_manager)"); fi
        ;;
    cuda)
        if [[ -n $devices ]]; then flags+=(--gpus "\"device=$devices\""); else flags+=(--gpus all); fi
        ;;
    cpu) [[ -z $devices ]] || fail "--devices goes with npu and cuda" ;;
esac

command=(docker run "${flags[@]}" "$image" "device=$kind" ${rest[@]+"${rest[@]}"})
if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}" && echo
else
    mkdir -p "$HF_HOME"  # or docker makes it, as root
    exec "${command[@]}"
fi
