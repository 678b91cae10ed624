#!/usr/bin/env bash
# One machine, or the same command on each of several machines (no ssh between them is needed).
#   RANKS=8 launch/torchrun.sh my.yaml [--section.key VALUE ...]              RANKS: per machine
#   on machine i of n:    NNODES=n NODE_RANK=i MASTER_ADDR=first-machine RANKS=8 launch/torchrun.sh my.yaml
#   machines that meet:   NNODES=n RDZV=first-machine:29400 RANKS=8 launch/torchrun.sh my.yaml         the same on each
# With RDZV machines need no numbers, and NNODES=2:4 goes on with 2 to 4 of them. RDZV_ID tells two jobs on one host apart.
# MAX_RESTARTS=3: torchrun starts the ranks again after a failure, and they continue from the last checkpoint.
# `doctor --dist --out FOLDER` in place of my.yaml checks these machines.
set -euo pipefail

refuse() {
    printf 'launch/torchrun.sh: %s\n' "$1" >&2
    exit 2
}

(($#)) || refuse "usage: [RANKS=n] launch/torchrun.sh CONFIG.yaml [--section.key VALUE ...]"
program=(gigamil.train.worker "$@")
if [[ $1 == doctor ]]; then program=(gigamil "$@"); fi

nodes=${NNODES:-1}
[[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || refuse "NNODES=$nodes must be a number of machines, or MIN:MAX with RDZV"
export MLFLOW_DISABLE_TELEMETRY=${MLFLOW_DISABLE_TELEMETRY:-true}
read -ra python <<<"${PYTHON:-python3}" # several words are fine: PYTHON="apptainer exec --nv gigamil.sif python3"
# No restarts by default: gigamil continues from its checkpoint when the same command is typed again.
command=("${python[@]}" -m torch.distributed.run --nproc-per-node "${RANKS:-1}" --max-restarts "${MAX_RESTARTS:-0}")
if [[ -n ${RDZV:-} ]]; then
    [[ $RDZV =~ .:[0-9]+$ ]] || refuse "RDZV=$RDZV must be HOST:PORT of one of the machines, the same on all"
    command+=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$RDZV" --rdzv-id "${RDZV_ID:-gigamil-$RDZV}")
elif [[ $nodes == 1 ]]; then
    command+=(--standalone)
else
    [[ $nodes != *:* ]] || refuse "NNODES=$nodes lets the number of machines change: set RDZV=first-machine:29400"
    if [[ ! ${NODE_RANK:-} =~ ^[0-9]+$ ]] || ((10#$NODE_RANK >= nodes)); then
        refuse "NODE_RANK=${NODE_RANK:-} must be the number of this machine: 0 to $((nodes - 1)); or set RDZV"
    fi
    [[ -n ${MASTER_ADDR:-} ]] || refuse "MASTER_ADDR is not set: the address of machine 0, the same on all; or set RDZV"
    command+=(--nnodes "$nodes" --node-rank "$((10#$NODE_RANK))")
    command+=(--master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
command+=(-m "${program[@]}")

printf '+'
printf ' %q' "${command[@]}"
printf '\n'
exec "${command[@]}"
