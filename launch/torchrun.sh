#!/usr/bin/env bash
# One machine, or the same command on each of several machines (no ssh between them is needed).
#   RANKS=8 launch/torchrun.sh my.yaml [--section.key VALUE ...]
#   on machine i of n:  NNODES=n NODE_RANK=i MASTER_ADDR=first-machine RANKS=8 launch/torchrun.sh my.yaml
set -euo pipefail
config=${1:?usage: [RANKS=n] launch/torchrun.sh CONFIG.yaml [--section.key VALUE ...]}
shift

ranks=${RANKS:-1} # per machine
nodes=${NNODES:-1}
export MLFLOW_DISABLE_TELEMETRY=${MLFLOW_DISABLE_TELEMETRY:-true}
# A rank that dies ends the job: gigamil continues from its checkpoint when the same command is typed again, so torchrun
# restarts nothing by itself.
command=("${PYTHON:-python3}" -m torch.distributed.run --nproc-per-node "$ranks" --max-restarts 0)
if ((nodes > 1)); then
    command+=(--nnodes "$nodes" --node-rank "${NODE_RANK:?NODE_RANK: number of this machine, 0 to NNODES-1}")
    command+=(--master-addr "${MASTER_ADDR:?MASTER_ADDR: name of the first machine}")
    command+=(--master-port "${MASTER_PORT:-29500}")
else
    command+=(--standalone)
fi
command+=(-m gigamil.train.worker "$config" "$@")

printf '+'
printf ' %q' "${command[@]}"
printf '\n'
exec "${command[@]}"
