#!/usr/bin/env bash
# DeepSpeed's own launcher, on machines that are listed in a hostfile (see hostfile.example).
#   HOSTFILE=hosts launch/deepspeed.sh my.yaml [--section.key VALUE ...]     from here it logs in on the others (pdsh, ssh)
#   RANKS=2 launch/deepspeed.sh my.yaml                                      this machine only, no hostfile
# Without ssh, on machine i of the hostfile (0 is its first line), the same on each:
#   NODE_RANK=i MASTER_ADDR=first-machine HOSTFILE=hosts launch/deepspeed.sh my.yaml
# `doctor --dist --out FOLDER` in place of my.yaml checks these machines. MASTER_PORT: a free port of the first one (29500).
# Variables for machines that are reached by ssh: copy deepspeed_env.example and set DS_ENV_FILE to the copy.
set -euo pipefail

refuse() { # CODE MESSAGE...
    printf 'launch/deepspeed.sh: %s\n' "${@:2}" >&2
    exit "$1"
}

# Sets `hosts`. DeepSpeed's rules: lines that are blank or begin with # are skipped, any other is HOST slots=NUMBER. It would
# end with a traceback where this names line and cure, and of `slots=4x` it would take the 4. Machines with unlike numbers
# of ranks gigamil refuses itself, once they have all been started.
read_hostfile() {
    local line number=0 host slots first
    local -A line_of=()
    hosts=()
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        line=${line%$'\r'}
        if [[ $line =~ ^[[:space:]]*(#.*)?$ ]]; then continue; fi
        [[ $line =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=([0-9]+)[[:space:]]*(#.*)?$ ]] ||
            refuse 2 "$HOSTFILE, line $number: '$line' must be HOST slots=NUMBER, for example: node01 slots=4"
        host=${BASH_REMATCH[1]} slots=$((10#${BASH_REMATCH[2]}))
        ((slots > 0)) ||
            refuse 2 "$HOSTFILE, line $number: $host has no slots; name its number of GPUs, or delete the line"
        [[ -z ${line_of[$host]:-} ]] ||
            refuse 2 "$HOSTFILE, line $number: $host is in line ${line_of[$host]}, too; give it one line with all of its slots"
        first=${first:-$slots}
        ((slots == first)) ||
            refuse 2 "$HOSTFILE, line $number: $host has $slots slots and ${hosts[0]} has $first; give all hosts the same number"
        line_of[$host]=$number
        hosts+=("$host")
    done <"$HOSTFILE"
    ((${#hosts[@]})) || refuse 2 "$HOSTFILE lists no host; start from launch/hostfile.example"
}

(($#)) || refuse 2 "usage: [HOSTFILE=file | RANKS=n] launch/deepspeed.sh CONFIG.yaml [--section.key VALUE ...]"
program=(gigamil.train.worker "$@")
if [[ $1 == doctor ]]; then program=(gigamil "$@"); fi

export MLFLOW_DISABLE_TELEMETRY=${MLFLOW_DISABLE_TELEMETRY:-true}
if [[ -n ${DS_ENV_FILE:-} ]]; then
    [[ -f $DS_ENV_FILE && -r $DS_ENV_FILE ]] ||
        refuse 2 "DS_ENV_FILE=$DS_ENV_FILE cannot be read; start from launch/deepspeed_env.example"
    # A relative name would be looked for in the home folder first.
    DS_ENV_FILE=$(realpath -- "$DS_ENV_FILE")
    export DS_ENV_FILE
    # The launcher splits every line at its first '=' and dies on any other, blank lines and comments included.
    if bad=$(grep -nvE '^[A-Za-z_][A-Za-z0-9_]*=' "$DS_ENV_FILE"); then
        refuse 2 "$DS_ENV_FILE: every line must be NAME=value, without blank lines or comments:" "$bad"
    fi
fi

# Several words are fine: PYTHON="apptainer exec --nv gigamil.sif python3".
read -ra python <<<"${PYTHON:-python3}"
command=("${python[@]}" -m deepspeed.launcher.runner --master_port "${MASTER_PORT:-29500}")
if [[ -z ${HOSTFILE:-} ]]; then
    [[ -z ${NODE_RANK:-} ]] || refuse 2 "NODE_RANK=$NODE_RANK is a line of a hostfile: set HOSTFILE, too"
    # No hostfile: else the launcher would take /job/hostfile, which some cluster images have.
    command+=(--hostfile /dev/null --num_gpus "${RANKS:-1}") # ranks, also where there is no GPU
else
    # Without this check the launcher would warn and quietly train on this machine alone.
    [[ -f $HOSTFILE && -r $HOSTFILE ]] || refuse 2 "no hostfile $HOSTFILE; start from launch/hostfile.example"
    read_hostfile
    command+=(--hostfile "$HOSTFILE")
    if [[ -n ${NODE_RANK:-} ]]; then
        if [[ ! $NODE_RANK =~ ^[0-9]+$ ]] || ((10#$NODE_RANK >= ${#hosts[@]})); then
            refuse 2 "NODE_RANK=$NODE_RANK is none of the ${#hosts[@]} hosts of $HOSTFILE: 0 to $((${#hosts[@]} - 1))"
        fi
        [[ -n ${MASTER_ADDR:-} ]] ||
            refuse 2 "MASTER_ADDR is not set: the address of ${hosts[0]}, the first host of $HOSTFILE, the same everywhere"
        command+=(--no_ssh --node_rank "$((10#$NODE_RANK))")
    else
        # The launcher, inside, would call ssh there, and start its own Python on the others, outside.
        ((${#python[@]} == 1)) ||
            refuse 2 "PYTHON=\"$PYTHON\" cannot be started by ssh; start this script on each host with NODE_RANK and MASTER_ADDR"
        tools=(ssh)
        if ((${#hosts[@]} > 1)); then tools+=(pdsh); fi
        for tool in "${tools[@]}"; do
            command -v "$tool" >/dev/null ||
                refuse 4 "$tool is not installed here; install it, or start this script on each host with NODE_RANK and MASTER_ADDR"
        done
    fi
    if [[ -n ${MASTER_ADDR:-} ]]; then command+=(--master_addr "$MASTER_ADDR"); fi
fi
command+=(--module "${program[@]}")

printf '+'
printf ' %q' "${command[@]}"
printf '\n'
exec "${command[@]}"
