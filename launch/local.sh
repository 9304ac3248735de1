#!/usr/bin/env bash
# One machine: a process per visible device.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=start.sh
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"

usage() {
    cat <<END
usage: launch/local.sh [options] [pipeline overrides]

$common_options
END
}

read_options "$@"
start --standalone
