#!/usr/bin/env bash
# DeepSpeed's own launcher: several machines that this one reaches by ssh without a password.
#   HOSTFILE=launch/hostfile launch/deepspeed.sh my.yaml [--section.key VALUE ...]
#   RANKS=2 launch/deepspeed.sh my.yaml                        this machine only, no hostfile
# Variables for the other machines: copy deepspeed_env.example and set DS_ENV_FILE to the copy.
set -euo pipefail
config=${1:?usage: [HOSTFILE=file | RANKS=n] launch/deepspeed.sh CONFIG.yaml [--section.key VALUE ...]}
shift

export MLFLOW_DISABLE_TELEMETRY=${MLFLOW_DISABLE_TELEMETRY:-true}
if [[ -n ${DS_ENV_FILE:-} ]]; then
    [[ -f $DS_ENV_FILE && -r $DS_ENV_FILE ]] || {
        printf 'DS_ENV_FILE=%s cannot be read; start from launch/deepspeed_env.example\n' "$DS_ENV_FILE" >&2
        exit 2
    }
    # A relative name would be looked for in the home folder first.
    DS_ENV_FILE=$(realpath -- "$DS_ENV_FILE")
    export DS_ENV_FILE
    # The launcher splits every line at its first '=' and dies on any other, blank lines and comments included.
    if bad=$(grep -nvE '^[A-Za-z_][A-Za-z0-9_]*=' "$DS_ENV_FILE"); then
        printf '%s: every line must be NAME=value, without blank lines or comments:\n%s\n' "$DS_ENV_FILE" "$bad" >&2
        exit 2
    fi
fi

command=("${PYTHON:-python3}" -m deepspeed.launcher.runner --master_port "${MASTER_PORT:-29500}")
if [[ -n ${HOSTFILE:-} ]]; then
    # Without this check the launcher would warn and quietly train on this machine alone.
    [[ -f $HOSTFILE ]] || { printf 'no hostfile %s; start from launch/hostfile.example\n' "$HOSTFILE" >&2; exit 2; }
    command+=(--hostfile "$HOSTFILE")
    if [[ -n ${MASTER_ADDR:-} ]]; then command+=(--master_addr "$MASTER_ADDR"); fi
else
    command+=(--num_nodes 1 --num_gpus "${RANKS:-1}") # ranks, also where there is no GPU
fi
command+=(--module gigamil.train.worker "$config" "$@")

printf '+'
printf ' %q' "${command[@]}"
printf '\n'
exec "${command[@]}"
