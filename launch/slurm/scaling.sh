#!/usr/bin/env bash
# How training scales over nodes: one job per number of nodes and mode, each a point of benchmarks/scaling.py.
#   launch/slurm/scaling.sh [--steps N ...]                 words go to benchmarks/scaling.py
#   NODES="1 2 4 8 16" GPUS=8 CPUS=12 OUT=runs/scaling MODES=strong launch/slurm/scaling.sh
# strong: the same global work on all; weak: the same work per GPU. Partition, account and time limit are sbatch's own
# variables: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT. Jobs of one mode run one after another (singleton): they
# share a folder, where each adds its point, and do not disturb each other. What is there already is not measured again.
# Start it where benchmarks/ is: in the repository.
set -euo pipefail

refuse() {
    printf 'launch/slurm/scaling.sh: %s\n' "$1" >&2
    exit 2
}

read -ra nodes <<<"${NODES:-1 2 4 8}"
read -ra modes <<<"${MODES:-strong weak}"
gpus=${GPUS:-4} # per node, and ranks
cpus=${CPUS:-8} # per rank
out=${OUT:-runs/scaling}
for count in "${nodes[@]}" "$gpus" "$cpus"; do
    [[ $count =~ ^[1-9][0-9]*$ ]] || refuse "NODES=\"${nodes[*]}\", GPUS=$gpus and CPUS=$cpus must be numbers from 1 on"
done
for mode in "${modes[@]}"; do
    [[ $mode == strong || $mode == weak ]] || refuse "MODES=\"${modes[*]}\" must be of: strong weak"
done
[[ -f benchmarks/scaling.py ]] || refuse "there is no benchmarks/scaling.py here; start it in the repository"
read -ra python <<<"${PYTHON:-python3}" # not in a container: it calls srun
mkdir -p "$out"
all=$(IFS=, && echo "${nodes[*]}") # each job is told of all points, so that all make the same cohort, and runs those it can

for mode in "${modes[@]}"; do
    for count in "${nodes[@]}"; do
        point=("${python[@]}" benchmarks/scaling.py --nodes "$all" --ranks-per-node "$gpus" --mode "$mode")
        point+=(--out "$out/$mode" "$@")
        job=(sbatch "--job-name=gigamil-scaling-$mode" --dependency=singleton --nodes="$count" --exclusive)
        job+=(--ntasks-per-node="$gpus" --gpus-per-node="$gpus" --cpus-per-task="$cpus" --hint=nomultithread)
        job+=(--output="$out/%x-%j.log")
        printf '+'
        printf ' %q' "${job[@]}"
        printf ' <<<'
        printf ' %q' "${point[@]}"
        printf '\n'
        "${job[@]}" <<JOB
#!/usr/bin/env bash
set -euo pipefail
export MLFLOW_DISABLE_TELEMETRY=true SRUN_CPUS_PER_TASK=$cpus
exec$(printf ' %q' "${point[@]}")
JOB
    done
done
