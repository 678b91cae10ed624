#!/usr/bin/env bash
# This machine, without a launcher to learn: gigamil starts its own ranks, forwards signals and reads the outcome.
#   launch/local.sh my.yaml [--section.key VALUE ...]          RANKS=2 launch/local.sh my.yaml
set -euo pipefail
(($#)) || {
    echo "usage: [RANKS=n] launch/local.sh CONFIG.yaml [--section.key VALUE ...]" >&2
    exit 2
}
config=$1
shift

export MLFLOW_DISABLE_TELEMETRY=${MLFLOW_DISABLE_TELEMETRY:-true}
read -ra python <<<"${PYTHON:-python3}" # several words are fine: PYTHON="apptainer exec --nv gigamil.sif python3"
command=("${python[@]}" -m gigamil train "$config")
if [[ -n ${RANKS:-} ]]; then command+=(--execution.ranks "$RANKS"); fi
command+=("$@")

printf '+'
printf ' %q' "${command[@]}"
printf '\n'
exec "${command[@]}"
