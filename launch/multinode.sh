#!/usr/bin/env bash
# Several machines without a scheduler: run the same command on each of them.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=start.sh
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"

usage() {
    cat <<END
usage: launch/multinode.sh --hosts A,B,... [--node-rank R] [options] [pipeline overrides]

Run it on every host, with the same arguments. All hosts need the same artifacts folder (a shared file system).
  --hosts A,B,...      names or addresses under which the hosts reach each other; the first keeps the rendezvous
  --node-rank R        this host's place in the list, from 0; default: the entry that names this host
  --port P             a free port of the first host (default 29500)
  --job NAME           a name that only this job uses (default pipeline)
Environment: JOIN_TIMEOUT, seconds to wait for all hosts (default 1800); RDZV_CONF, more of torchrun's --rdzv-conf.

$common_options
END
}

own_place() {
    local place=0 host names
    names=" $(hostname) $(hostname -s) $(hostname -I 2>/dev/null || true) "
    for host in "${hosts[@]}"; do
        if [[ $names == *" $host "* ]]; then echo "$place" && return; fi
        place=$((place + 1))
    done
    fail "none of ${hosts[*]} names this host ($names); give --node-rank"
}

list="" node="" port=29500 job=pipeline rest=()
while (($#)); do
    case $1 in
        --hosts) list=${2:-} && shift ;;
        --node-rank) node=${2:-} && shift ;;
        --port) port=${2:-} && shift ;;
        --job) job=${2:-} && shift ;;
        *) rest+=("$1") ;;
    esac
    shift || fail "the last option has no value"
done
read_options ${rest[@]+"${rest[@]}"}
[[ -n $list ]] || fail "--hosts is missing; list every host, the first one first"
IFS=, read -r -a hosts <<<"$list"
[[ -n $node ]] || node=$(own_place)
start_node "$node" "${#hosts[@]}" "${hosts[0]}" "$port" "$job" "${hosts[node]:-}"
