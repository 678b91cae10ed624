"""The scripts of launch/: what they start, what they refuse and how they end. Python and Slurm's commands are stand-ins.

What these tests cannot show: that a real srun, scontrol or scancel takes these words and behaves as the stand-ins do.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
HOSTS = "node01 slots=4\nnode02 slots=4\n"
# Of a job of Slurm; none of this machine's own variables may come in.
JOB = {"SLURM_JOB_ID": "41007", "SLURM_JOB_NODELIST": "node[01-02]", "SLURM_CPUS_PER_TASK": "8"}
ELEMENT = {"SLURM_ARRAY_JOB_ID": "41000", "SLURM_ARRAY_TASK_MIN": "1"}

# With quotes, so that words which were split on their way are seen.
NOTE = """note() { { printf '%s' "$1"; printf ' %q' "${@:2}"; echo; } >>"$FOLDER/calls"; }"""
# Each notes its words in $FOLDER/calls. srun and gigamil may wait until they are told to end, as ranks do.
STAND_INS = {
    "srun": """
note srun "$@"
env | grep -E '^(MASTER_|GIGAMIL_|MLFLOW_|SRUN_)' >"$FOLDER/environment"
if [[ -n ${WAITS:-} && $* == *$WAITS* ]]; then
    until [[ -e $FOLDER/asked ]]; do sleep 0.02; done
    exit "${ENDS:-5}"
fi
exit 0
""",
    # As slow as a busy controller: ranks have ended before the trap that asks them is over.
    "scancel": 'note scancel "$@"; touch "$FOLDER/asked"; sleep 0.3; exit "${SCANCEL_ENDS:-0}"',
    "scontrol": 'if [[ $1 == show ]]; then printf "node01\\nnode02\\n"; else note scontrol "$@"; fi',
    "sbatch": 'note sbatch "$@"; cat >>"$FOLDER/jobs"',
    "ssh": "exit 0",
    "pdsh": "exit 0",
    "python": """
if [[ $1 == -c ]]; then exec "$REAL_PYTHON" "$@"; fi
if [[ $* == *--print_config ]]; then cat "$FOLDER/resolved.yaml"; exit "${PRINTS:-0}"; fi
note python "$@"
if [[ $* == *" tile "* && -n ${WAITS:-} ]]; then
    trap 'exit "${ENDS:-5}"' INT
    touch "$FOLDER/started"
    while true; do sleep 0.02; done
fi
""",
}


class Desk:
    """A folder with stand-ins in front of the real commands, and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, program in STAND_INS.items():
            path = folder / "bin" / name
            path.write_text(f"#!/usr/bin/env bash\n{NOTE}\n{program}\n")
            path.chmod(0o755)
        self.started: list[subprocess.Popen[str]] = []

    def start(self, script: str, *words: str, **variables: str) -> "subprocess.Popen[str]":
        own = {"FOLDER": str(self.folder), "REAL_PYTHON": sys.executable, "PYTHON": "python", "HOME": str(self.folder)}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        process = subprocess.Popen(
            [str(LAUNCH / script), *words]
            if os.access(LAUNCH / script, os.X_OK)
            else ["bash", str(LAUNCH / script), *words],
            cwd=self.folder,
            env={"PATH": path, **own, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, script: str, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(script, *words, **variables)
        out, err = process.communicate(timeout=20)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.is_file() else []

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + 20
        while not any(words in call for call in self.calls()):
            assert time.monotonic() < deadline, f"{words!r} was not called: {self.calls()}"
            time.sleep(0.02)

    def write(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text)
        return name


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def started(result: "subprocess.CompletedProcess[str]") -> str:
    """The command that a script printed."""
    assert result.returncode == 0, result.stderr
    first = result.stdout.splitlines()[0]
    assert first.startswith("+ ")
    return first.removeprefix("+ ")


ALL = [
    ("local.sh", {}),
    ("deepspeed.sh", {}),
    ("torchrun.sh", {}),
    ("slurm/train.sbatch", JOB),
    ("slurm/tile.sbatch", JOB | ELEMENT | {f"SLURM_ARRAY_TASK_{name}": "4" for name in ("MAX", "COUNT", "ID")}),
    ("slurm/folds.sbatch", JOB | ELEMENT | {"SLURM_ARRAY_TASK_ID": "7"}),
]


@pytest.mark.parametrize(("script", "variables"), ALL, ids=[script for script, _ in ALL])
def test_words_are_handed_on_as_they_are_and_the_command_is_printed(
    desk: Desk, script: str, variables: dict[str, str]
) -> None:
    write_resolved(desk)
    result = desk.run(script, "my run.yaml", "--science.epochs", "2", **variables)
    assert result.returncode == 0, result.stderr
    printed = [shlex.split(line.removeprefix("+ ")) for line in result.stdout.splitlines() if line.startswith("+ ")]
    assert [shlex.split(call) for call in desk.calls()] == printed
    for words in printed:
        at = words.index("my run.yaml")
        assert "--science.epochs" in words[at:]
        assert words[words.index("--science.epochs") + 1] == "2"


@pytest.mark.parametrize("script", [script for script, _ in ALL])
def test_without_a_yaml_they_say_how_they_are_used(desk: Desk, script: str) -> None:
    result = desk.run(script)
    assert result.returncode == 2
    assert "usage: " in result.stderr
    assert desk.calls() == []


@pytest.mark.parametrize(("script", "variables"), ALL[:3], ids=[script for script, _ in ALL[:3]])
def test_the_interpreter_may_be_several_words(desk: Desk, script: str, variables: dict[str, str]) -> None:
    desk.write("bin/inside", "")
    (desk.folder / "bin" / "inside").write_text('#!/usr/bin/env bash\nexec "${@:2}"\n')
    (desk.folder / "bin" / "inside").chmod(0o755)
    assert started(desk.run(script, "my.yaml", PYTHON="inside --nv python", **variables)).startswith(
        "inside --nv python"
    )


class TestDeepspeed:
    def test_one_machine_needs_no_hostfile(self, desk: Desk) -> None:
        command = started(desk.run("deepspeed.sh", "my.yaml", RANKS="2"))
        assert "--hostfile /dev/null --num_gpus 2 --module gigamil.train.worker my.yaml" in command

    def test_machines_with_ssh(self, desk: Desk) -> None:
        hosts = desk.write("hosts", HOSTS)
        command = started(desk.run("deepspeed.sh", "my.yaml", HOSTFILE=hosts, MASTER_PORT="1234"))
        assert "--master_port 1234 --hostfile hosts --module gigamil.train.worker my.yaml" in command

    def test_machines_without_ssh(self, desk: Desk) -> None:
        hosts = desk.write("hosts", HOSTS)
        command = started(desk.run("deepspeed.sh", "my.yaml", HOSTFILE=hosts, NODE_RANK="1", MASTER_ADDR="10.0.0.1"))
        assert "--hostfile hosts --no_ssh --node_rank 1 --master_addr 10.0.0.1 --module" in command

    def test_the_doctor_in_place_of_a_yaml(self, desk: Desk) -> None:
        assert started(desk.run("deepspeed.sh", "doctor", "--dist")).endswith("--module gigamil doctor --dist")

    def test_blank_lines_and_comments_are_skipped(self, desk: Desk) -> None:
        hosts = desk.write("hosts", f"# machines\n\n  \n{HOSTS}\t\n  # none\n node03   slots=04 # the last\r\n\n")
        words = {"HOSTFILE": hosts, "MASTER_ADDR": "a"}
        assert "--node_rank 2" in started(desk.run("deepspeed.sh", "my.yaml", NODE_RANK="2", **words))
        assert "0 to 2" in desk.run("deepspeed.sh", "my.yaml", NODE_RANK="3", **words).stderr

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("node01 slots=4\nnode02 slots=two\n", "hosts, line 2: 'node02 slots=two' must be HOST slots=NUMBER"),
            ("node01 slots=4x\n", "hosts, line 1: 'node01 slots=4x' must be"),
            ("node01 slots=-4\n", "line 1"),
            ("node01\n", "line 1: 'node01' must be"),
            ("node01 slots = 4\n", "line 1"),
            ("\nnode01 slots=0\n", "line 2: node01 has no slots"),
            (f"{HOSTS}node01 slots=4", "line 3: node01 is in line 1, too"),
            ("node01 slots=4\nnode02 slots=2\n", "line 2: node02 has 2 slots and node01 has 4"),
            ("\n# nothing\n", "hosts lists no host"),
        ],
    )
    def test_a_wrong_hostfile_is_refused_with_its_line(self, desk: Desk, text: str, words: str) -> None:
        result = desk.run("deepspeed.sh", "my.yaml", HOSTFILE=desk.write("hosts", text))
        assert result.returncode == 2
        assert words in result.stderr
        assert desk.calls() == []

    @pytest.mark.parametrize(
        ("variables", "words"),
        [
            ({"HOSTFILE": "nosuch"}, "no hostfile nosuch"),
            ({"NODE_RANK": "1"}, "set HOSTFILE, too"),
            (
                {"HOSTFILE": "hosts", "NODE_RANK": "1"},
                "MASTER_ADDR is not set: the address of node01, the first host of hosts",
            ),
            (
                {"HOSTFILE": "hosts", "NODE_RANK": "2", "MASTER_ADDR": "a"},
                "NODE_RANK=2 is none of the 2 hosts of hosts: 0 to 1",
            ),
            ({"HOSTFILE": "hosts", "NODE_RANK": "x", "MASTER_ADDR": "a"}, "NODE_RANK=x is none of the 2 hosts"),
            ({"DS_ENV_FILE": "nosuch"}, "DS_ENV_FILE=nosuch cannot be read"),
            ({"DS_ENV_FILE": "hosts"}, "every line must be NAME=value, without blank lines or comments:\n"),
        ],
    )
    def test_wrong_variables_are_refused(self, desk: Desk, variables: dict[str, str], words: str) -> None:
        desk.write("hosts", HOSTS)
        result = desk.run("deepspeed.sh", "my.yaml", **variables)
        assert result.returncode == 2
        assert words in result.stderr
        assert desk.calls() == []

    def test_an_interpreter_inside_a_container_is_not_started_by_ssh(self, desk: Desk) -> None:
        hosts, inside = desk.write("hosts", HOSTS), "env python"
        result = desk.run("deepspeed.sh", "my.yaml", HOSTFILE=hosts, PYTHON=inside)
        assert result.returncode == 2
        assert 'PYTHON="env python" cannot be started by ssh; start this script on each host' in result.stderr
        assert desk.calls() == []
        own = {"NODE_RANK": "0", "MASTER_ADDR": "node01"}
        assert started(desk.run("deepspeed.sh", "my.yaml", HOSTFILE=hosts, PYTHON=inside, **own)).startswith(inside)

    @pytest.mark.slow
    def test_deepspeed_reads_the_hostfiles_that_pass_alike(self) -> None:
        from deepspeed.launcher.runner import _parse_hostfile

        text = f"# machines\n\n  \n{HOSTS}\t\n  # none\n node03   slots=04 # the last\r\n\n"
        assert dict(_parse_hostfile(text.splitlines(keepends=True))) == {"node01": 4, "node02": 4, "node03": 4}


class TestTorchrun:
    def test_one_machine_finds_its_own_port(self, desk: Desk) -> None:
        command = started(desk.run("torchrun.sh", "my.yaml", RANKS="8"))
        assert "--nproc-per-node 8 --max-restarts 0 --standalone -m gigamil.train.worker my.yaml" in command

    def test_numbered_machines(self, desk: Desk) -> None:
        command = started(desk.run("torchrun.sh", "my.yaml", NNODES="2", NODE_RANK="1", MASTER_ADDR="a", RANKS="8"))
        assert "--nnodes 2 --node-rank 1 --master-addr a --master-port 29500 -m gigamil.train.worker" in command

    def test_machines_that_find_each_other(self, desk: Desk) -> None:
        command = started(desk.run("torchrun.sh", "my.yaml", NNODES="2:4", RDZV="a:29400", MAX_RESTARTS="3"))
        assert "--max-restarts 3 --nnodes 2:4 --rdzv-backend c10d --rdzv-endpoint a:29400" in command
        assert "--rdzv-id gigamil-a:29400 -m gigamil.train.worker my.yaml" in command

    @pytest.mark.parametrize(
        ("variables", "words"),
        [
            ({"NNODES": "two"}, "NNODES=two must be a number of machines"),
            ({"NNODES": "2:4"}, "set RDZV=first-machine:29400"),
            ({"NNODES": "2"}, "NODE_RANK= must be the number of this machine: 0 to 1"),
            ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2 must be"),
            ({"NNODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR is not set"),
            ({"RDZV": "a"}, "RDZV=a must be HOST:PORT"),
        ],
    )
    def test_wrong_variables_are_refused(self, desk: Desk, variables: dict[str, str], words: str) -> None:
        result = desk.run("torchrun.sh", "my.yaml", **variables)
        assert result.returncode == 2
        assert words in result.stderr


class TestTrainingUnderSlurm:
    def test_ranks_know_where_they_meet(self, desk: Desk) -> None:
        command = started(desk.run("slurm/train.sbatch", "my.yaml", **JOB))
        assert command.startswith("srun --gpu-bind=none --kill-on-bad-exit=0 --wait=60 python -m gigamil.train.worker")
        environment = (desk.folder / "environment").read_text()
        for word in (
            "MASTER_ADDR=node01",
            "MASTER_PORT=21007",
            "SRUN_CPUS_PER_TASK=8",
            "MLFLOW_DISABLE_TELEMETRY=true",
        ):
            assert word in environment

    def test_the_doctor_in_place_of_a_yaml(self, desk: Desk) -> None:
        assert started(desk.run("slurm/train.sbatch", "doctor", "--dist", **JOB)).endswith("-m gigamil doctor --dist")

    @pytest.mark.parametrize("scancel", ["0", "1"])
    def test_a_signal_asks_the_ranks_and_requeues(self, desk: Desk, scancel: str) -> None:
        # The stand-in ends while the trap is still busy: bash's `wait` has then only told that it was cut short.
        process = desk.start("slurm/train.sbatch", "my.yaml", **JOB, WAITS="worker", SCANCEL_ENDS=scancel)
        desk.wait_for("srun ")
        process.send_signal(signal.SIGUSR1)
        out, _ = process.communicate(timeout=20)
        assert process.returncode == 5
        assert desk.calls()[1:] == ["scancel --signal=TERM 41007", "scontrol requeue 41007"]
        assert "back into the queue" in out

    @pytest.mark.parametrize("code", ["0", "6", "143"])
    def test_another_end_is_passed_on_and_not_requeued(self, desk: Desk, code: str) -> None:
        process = desk.start("slurm/train.sbatch", "my.yaml", **JOB, WAITS="worker", ENDS=code)
        desk.wait_for("srun ")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
        assert process.returncode == int(code)
        assert not any("requeue" in call for call in desk.calls())

    def test_an_end_without_a_signal(self, desk: Desk) -> None:
        (desk.folder / "asked").touch()
        assert desk.run("slurm/train.sbatch", "my.yaml", **JOB, WAITS="worker", ENDS="6").returncode == 6
        assert desk.run("slurm/train.sbatch", "my.yaml", **JOB, WAITS="worker", ENDS="5").returncode == 5
        assert desk.calls()[-1] == "scontrol requeue 41007"


class TestTilingUnderSlurm:
    ARRAY = JOB | ELEMENT | {"SLURM_ARRAY_TASK_MAX": "4", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_ID": "3"}

    def test_a_job_takes_its_part(self, desk: Desk) -> None:
        command = started(desk.run("slurm/tile.sbatch", "my.yaml", **self.ARRAY))
        assert command == "python -m gigamil tile my.yaml --shard 3/4 --execution.tile_workers 8"

    def test_an_array_with_gaps_is_refused(self, desk: Desk) -> None:
        result = desk.run("slurm/tile.sbatch", "my.yaml", **(self.ARRAY | {"SLURM_ARRAY_TASK_COUNT": "3"}))
        assert result.returncode == 2
        assert "--array=1-4" in result.stderr

    @pytest.mark.parametrize(("code", "is_requeued"), [("5", True), ("3", False), ("130", False)])
    def test_a_signal_is_passed_on(self, desk: Desk, code: str, is_requeued: bool) -> None:
        process = desk.start("slurm/tile.sbatch", "my.yaml", **self.ARRAY, WAITS="yes", ENDS=code)
        desk.wait_for("python ")
        wait_until((desk.folder / "started").exists)
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=20)
        assert process.returncode == int(code)
        assert ("scontrol requeue 41000_3" in desk.calls()) == is_requeued


def write_resolved(desk: Desk, **changes: object) -> None:
    """What `gigamil train my.yaml --print_config` would say."""
    cohort = {"split_method": "holdout", "splits": None} | changes
    book = {"out": "/runs/study one", "shards": None}
    desk.write("resolved.yaml", yaml.safe_dump({"bookkeeping": book, "cohort": cohort, "science": {"seed": 40}}))


class TestFolds:
    @staticmethod
    def element(number: int) -> dict[str, str]:
        return JOB | ELEMENT | {"SLURM_ARRAY_TASK_ID": str(number)}

    def test_a_job_splits_trains_and_evaluates_its_fold_and_seed(self, desk: Desk) -> None:
        write_resolved(desk)
        result = desk.run("slurm/folds.sbatch", "my.yaml", "--science.epochs", "2", **self.element(7))
        assert result.returncode == 0, result.stderr
        split, train, evaluate, report = desk.calls()
        assert split.startswith("srun --nodes=1 --ntasks=1 python -m gigamil split my.yaml --science.epochs 2 ")
        assert train.startswith(
            "srun --gpu-bind=none --kill-on-bad-exit=0 --wait=60 python -m gigamil.train.worker my.yaml "
        )
        assert evaluate.startswith("srun --nodes=1 --ntasks=1 python -m gigamil evaluate my.yaml ")
        for call in (split, train, evaluate):
            assert r"--cohort.fold 2 --science.seed 41 --bookkeeping.out /runs/study\ one/study/fold2_seed1 " in call
            assert r"--bookkeeping.shards /runs/study\ one/shards --bookkeeping.name fold2_seed1" in call
            assert call.endswith("--cohort.folds 5 --cohort.split_method kfold")
        assert report == (
            "srun --nodes=1 --ntasks=1 python -m gigamil run my.yaml --science.epochs 2 --cohort.folds 5 --cohort.split_method kfold "
            "--folds all --seeds 3 --report-only"
        )
        assert "GIGAMIL_MLFLOW_PARENT=my\n" in (desk.folder / "environment").read_text()

    def test_all_folds_and_seeds_have_folders_of_their_own(self, desk: Desk) -> None:
        write_resolved(desk)
        for number in range(4):
            desk.run("slurm/folds.sbatch", "my.yaml", **self.element(number), FOLDS="2", SEEDS="2")
        calls = [call for call in desk.calls() if "--report-only" not in call]
        names = {call.split("--bookkeeping.name ")[1].split()[0] for call in calls}
        assert names == {"fold0_seed0", "fold1_seed0", "fold0_seed1", "fold1_seed1"}

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"split_method": "monte_carlo"}, "--bookkeeping.name fold0_seed0 --cohort.folds 5"),
            ({"splits": "folds.json"}, "--bookkeeping.name fold0_seed0"),
        ],
    )
    def test_folds_of_the_yaml_stay(self, desk: Desk, changes: dict[str, object], words: str) -> None:
        write_resolved(desk, **changes)
        desk.run("slurm/folds.sbatch", "my.yaml", **self.element(0))
        assert [call.endswith(words) for call in desk.calls()[:3]] == [True] * 3

    @pytest.mark.parametrize(
        ("variables", "words"),
        [
            ({"SLURM_ARRAY_TASK_ID": "15"}, "job 15 is none of 5 folds x 3 seeds: submit it with --array=0-14"),
            ({"SLURM_ARRAY_TASK_ID": "0", "FOLDS": "0"}, "FOLDS=0"),
            ({}, "submit it with --array=0-14"),
        ],
    )
    def test_a_wrong_array_is_refused(self, desk: Desk, variables: dict[str, str], words: str) -> None:
        write_resolved(desk)
        result = desk.run("slurm/folds.sbatch", "my.yaml", **JOB, **variables)
        assert result.returncode == 2
        assert words in result.stderr
        assert desk.calls() == []

    def test_a_yaml_that_is_refused_ends_the_job(self, desk: Desk) -> None:
        write_resolved(desk)
        assert desk.run("slurm/folds.sbatch", "my.yaml", **self.element(0), PRINTS="2").returncode == 2
        assert desk.calls() == []

    @pytest.mark.parametrize("stage", ["split", "worker", "evaluate"])
    def test_a_signal_in_any_stage_requeues(self, desk: Desk, stage: str) -> None:
        write_resolved(desk)
        ends = "5" if stage == "worker" else "143"
        process = desk.start("slurm/folds.sbatch", "my.yaml", **self.element(3), WAITS=stage, ENDS=ends)
        desk.wait_for(stage)
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=20)
        assert process.returncode == 5
        assert desk.calls()[-1] == "scontrol requeue 41000_3"
        # Not SLURM_JOB_ID: for one job of an array that is the number of the whole array.
        assert "scancel --signal=TERM 41000_3" in desk.calls()
        assert stage in [call for call in desk.calls() if call.startswith("srun")][-1]

    def test_a_stage_that_fails_is_the_last(self, desk: Desk) -> None:
        write_resolved(desk)
        (desk.folder / "asked").touch()
        assert desk.run("slurm/folds.sbatch", "my.yaml", **self.element(0), WAITS="worker", ENDS="6").returncode == 6
        assert len(desk.calls()) == 2


class TestScaling:
    def test_a_job_for_each_number_of_nodes_and_mode(self, desk: Desk) -> None:
        (desk.folder / "benchmarks").mkdir()
        (desk.folder / "benchmarks" / "scaling.py").touch()
        result = desk.run("slurm/scaling.sh", "--steps", "9", NODES="1 2", GPUS="8", OUT="out folder")
        assert result.returncode == 0, result.stderr
        calls = desk.calls()
        assert [call.split("--nodes=")[1].split()[0] for call in calls] == ["1", "2", "1", "2"]
        assert all("--dependency=singleton" in call and "--gpus-per-node=8" in call for call in calls)
        jobs = (desk.folder / "jobs").read_text()
        assert jobs.count("#!/usr/bin/env bash\n") == 4
        last = shlex.split(jobs.splitlines()[-1])
        assert last[1:3] == ["python", "benchmarks/scaling.py"]
        assert last[3:] == [
            *["--nodes", "1,2", "--ranks-per-node", "8", "--mode", "weak", "--out"],
            "out folder/weak",
            "--steps",
            "9",
        ]
        assert subprocess.run(["bash", "-n"], input=jobs, text=True, check=False).returncode == 0

    @pytest.mark.parametrize("variables", [{"NODES": "1 two"}, {"GPUS": "0"}, {"MODES": "strange"}, {}])
    def test_wrong_variables_are_refused(self, desk: Desk, variables: dict[str, str]) -> None:
        result = desk.run("slurm/scaling.sh", **variables)
        assert result.returncode == 2
        assert next(iter(variables.values()), "benchmarks/scaling.py") in result.stderr
        assert desk.calls() == []


def test_the_pods_run_the_worker() -> None:
    job = yaml.safe_load((LAUNCH / "k8s" / "trainjob.yaml").read_text())
    assert job["kind"] == "TrainJob"
    assert job["spec"]["trainer"]["command"][-2:] == ["-m", "gigamil.train.worker"]


def test_every_script_is_in_the_table() -> None:
    table = (LAUNCH / "README.md").read_text()
    scripts = [path for path in LAUNCH.rglob("*") if path.suffix in (".sh", ".sbatch", ".yaml", ".def", "")]
    names = [str(path.relative_to(LAUNCH)) for path in scripts if path.is_file()]
    assert [name for name in names if f"launch/{name}" not in table] == []


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)
