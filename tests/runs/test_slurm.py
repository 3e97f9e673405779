"""Scripts for Slurm, run by bash with a few shell scripts as sbatch, srun and scontrol, as far as they matter."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import pretrain_values, small_cohort, write_yaml

from medssl.config import CompareConfig, load_config
from medssl.core.errors import ConfigError, MedsslError
from medssl.runs import slurm
from medssl.runs.slurm import Resources, write_job

ROOT = Path(__file__).parents[2]

SBATCH = r"""#!/bin/bash
# Runs every task at once, and again as long as it is queued again. The n-th start of the first task is sent the n-th
# signal of $SIGNALS as soon as the file $READY is there.
echo "$*" >> "$CLUSTER/submitted"
name=none; array=""; first=""; last=""
while [[ "$1" == -* ]]; do
    case "$1" in --array=*) array=${1#--array=1-}; last=${array%%%*};; esac
    shift
done
script=$1; shift
id=$(( $(cat "$CLUSTER/last_id" 2>/dev/null || echo 100) + 1 )); echo $id > "$CLUSTER/last_id"
chdir=$(grep -- '--chdir=' "$script" | sed 's/.*--chdir=//')
cd "$(eval echo "$chdir")" || exit 1
export SLURM_CPUS_PER_TASK=1 SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_NODELIST=localhost
export SLURM_JOB_NAME=fake
code=0
for task in $(seq 1 "${last:-1}"); do
    export SLURM_JOB_ID=$((id * 1000 + task)) job
    job=$SLURM_JOB_ID
    if [ -n "$last" ]; then export SLURM_ARRAY_JOB_ID=$id SLURM_ARRAY_TASK_ID=$task; job=${id}_$task; fi
    export SLURM_RESTART_COUNT=${FIRST_RESTART:-0}
    signals=($SIGNALS)
    while true; do
        bash "$script" "$@" >> "$CLUSTER/output" 2>&1 &
        pid=$!
        if [ ${#signals[@]} -gt 0 ]; then
            until [ -e "$READY" ] || ! kill -0 $pid 2>/dev/null; do sleep 0.02; done
            kill -"${signals[0]}" $pid
            signals=("${signals[@]:1}")
        fi
        wait $pid; code=$?
        echo "$job $code" >> "$CLUSTER/ended"
        [ -e "$CLUSTER/requeue_$job" ] || break
        rm "$CLUSTER/requeue_$job"
        SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
    done
done
echo $id
"""
SCONTROL = r"""#!/bin/bash
[ -z "$SCONTROL_FAILS" ] || { echo "slurm_requeue error" >&2; exit 1; }
[ "$1" = requeue ] && touch "$CLUSTER/requeue_$2"
"""
SRUN = r"""#!/bin/bash
while [[ "$1" == -* ]]; do shift; done
exec "$@"
"""
MEDSSL = r"""#!/bin/bash
printf '%s\0' "$@" >> "$CLUSTER/calls"; echo >> "$CLUSTER/calls"
[ -z "$SAVES" ] || trap 'exit 75' USR2
[ "$SLURM_RESTART_COUNT" = 0 ] || [ "$SLURM_RESTART_COUNT" = 100 ] || exit "${THEN:-0}"
touch "$READY"
[ -z "$SIGNALS" ] || for i in $(seq 500); do read -rt 0.02 <> <(:); done
exit "${THEN:-0}"
"""


class Cluster:
    """The folder of the fake programs, and what they noted."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder / "cluster", patch
        self.folder.mkdir()
        for name, text in {"sbatch": SBATCH, "scontrol": SCONTROL, "srun": SRUN}.items():
            self.program(name, text)
        patch.setenv("PATH", f"{self.folder}:{os.environ['PATH']}")
        patch.setenv("CLUSTER", str(self.folder))
        patch.setenv("READY", str(self.folder / "ready"))

    def program(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def stand_in(self, **settings: str) -> None:
        """A program in the place of medssl that notes how it was called, and does as it is told."""
        path = self.program("stand in", MEDSSL)
        self.patch.setattr(slurm, "_medssl", lambda: [str(path)])
        for name, value in settings.items():
            self.patch.setenv(name, value)

    def noted(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def calls(self) -> list[list[str]]:
        return [line.split("\0")[:-1] for line in self.noted("calls")]

    @property
    def codes(self) -> list[int]:
        return [int(line.split()[-1]) for line in self.noted("ended")]


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Cluster:
    monkeypatch.chdir(tmp_path)
    return Cluster(tmp_path, monkeypatch)


@pytest.fixture
def config(tmp_path) -> Path:
    return write_yaml(tmp_path / "gcl.yaml", pretrain_values(tmp_path / "manifest.csv", tmp_path))


def test_a_real_run_is_stopped_before_its_time_queued_again_and_goes_on(cluster, tmp_path):
    training = {"steps": 60, "checkpoint_every": 10, "log_every": 1, "workers": 0, "accelerator": "cpu"}
    path = write_yaml(
        tmp_path / "run.yaml", pretrain_values(small_cohort(tmp_path / "data"), tmp_path, training=training)
    )
    cluster.patch.setattr(slurm, "_medssl", lambda: [sys.executable, "-m", "medssl.cli.main"])
    cluster.patch.setenv("SIGNALS", "USR2")
    run = tmp_path / "runs" / "gcl"
    cluster.patch.setenv("READY", str(run / "checkpoints" / "last"))
    write_job(path, None, Resources(), submit=True)
    output = "\n".join(cluster.noted("output"))
    assert cluster.codes == [75, 0], output
    assert "restart 1" in output
    steps = [int(line.split(",")[0]) for line in (run / "logs" / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == list(range(1, 61))
    assert json.loads((run / "status.json").read_text())["state"] == "done"


@pytest.mark.parametrize(
    ("signals", "settings", "codes", "said"),
    [
        pytest.param("", {}, [0], "", id="runs through"),
        pytest.param("", {"THEN": "3"}, [3], "", id="a failure is not repeated"),
        pytest.param("", {"THEN": "75"}, [75], "", id="stopped by somebody else"),
        pytest.param("USR2", {"SAVES": "1"}, [75, 0], "restart 1", id="time is over"),
        pytest.param("USR2", {}, [140, 0], "restart 1", id="time is over before it began"),
        pytest.param("USR2", {"SAVES": "1", "THEN": "3"}, [75, 3], "restart 1", id="fails later"),
        pytest.param("TERM", {"SAVES": "1"}, [75], "", id="cancelled or preempted"),
        pytest.param("USR2", {"SAVES": "1", "FIRST_RESTART": "100"}, [75], "stopped 101 times", id="gets nowhere"),
        pytest.param("USR2", {"SAVES": "1", "SCONTROL_FAILS": "1"}, [75], "could not be queued", id="no requeue"),
    ],
)
def test_what_ends_a_job_and_what_brings_it_back(cluster, config, signals, settings, codes, said):
    cluster.stand_in(SIGNALS=signals, **settings)
    write_job(config, None, Resources(), submit=True)
    output = "\n".join(cluster.noted("output"))
    assert cluster.codes == codes, output
    assert said in output
    assert cluster.calls == [["pretrain", str(config), "--resume"]] * len(codes)


def test_a_job_that_comes_back_waits_for_the_mark_of_a_node_that_failed(cluster, config, tmp_path):
    cluster.stand_in(FIRST_RESTART="1")
    cluster.program("sleep", '#!/bin/bash\necho "$1" >> "$CLUSTER/slept"\n')
    lock = tmp_path / "runs" / "gcl" / "run.lock"
    lock.parent.mkdir(parents=True)
    for content, slept in (("", []), ("{}", ["360"])):
        lock.write_text(content)  # empty: the run before ended in order
        write_job(config, None, Resources(), submit=True, force=True)
        assert cluster.noted("slept") == slept
    assert cluster.codes == [0, 0]


def test_names_with_spaces_and_quotes_and_overrides_reach_medssl_as_they_are(cluster, tmp_path):
    cluster.stand_in()
    folder = tmp_path / "it's a $folder"
    folder.mkdir()
    cluster.patch.chdir(folder)
    path = write_yaml(folder / "my run.yaml", pretrain_values(folder / "manifest.csv", folder))
    overrides = ["name=other", "status=it's `new`"]
    resources = Resources(setup=["export GREETING='good day'"], more=["--constraint=a100"], mem="4G", cpus=3)
    write_job(path, Path("a job.sbatch"), resources, overrides=overrides, submit=True)
    assert cluster.codes == [0], cluster.noted("output")
    assert cluster.calls == [["pretrain", str(path), "--resume", "--set", overrides[0], "--set", overrides[1]]]
    text = Path("a job.sbatch").read_text()
    options = dict(
        word.partition("=")[::2] for line in text.splitlines() if line.startswith("#SBATCH ")
        for word in shlex.split(line)[1:]
    )  # fmt: skip
    assert options["--chdir"] == str(folder)
    assert options["--job-name"] == "medssl-other"
    assert (options["--mem"], options["--cpus-per-task"], options["--constraint"]) == ("4G", "3", "a100")
    assert "--gres" not in options  # training.accelerator: cpu
    assert options["--signal"] == "B:USR2@300"
    assert "\nexport GREETING='good day'\n" in text


def test_a_comparison_is_two_arrays_and_a_report_that_follow_each_other(cluster):
    cluster.stand_in()
    path = ROOT / "configs" / "hippocampus" / "comparison.yaml"
    plan = load_config(CompareConfig, path)
    done = write_job(path, None, Resources(parts=3, array_limit=2, time="1-00"), submit=True)
    name = f"medssl-{plan.name}"
    script = Path.cwd() / "comparison.sbatch"
    assert cluster.noted("submitted") == [
        f"--parsable --job-name={name}-pretraining --array=1-3%2 {script} pretraining 3",
        f"--parsable --job-name={name}-cells --array=1-3%2 --dependency=afterany:101 {script} cells 3",
        f"--parsable --dependency=afterany:102 {script}",
    ]
    begin = ["compare", "--plan", str(path), "--resume"]
    parts = [["--stage", stage, "--part", f"{i}/3"] for stage in ("pretraining", "cells") for i in (1, 2, 3)]
    assert cluster.calls == [begin + part for part in [*parts, []]]
    assert cluster.codes == [0] * 7
    assert "scancel 101 102 103" in done.text()
    whole = write_job(path, Path("whole.sbatch"), Resources())
    assert whole.to_json()["command"] == "bash whole.submit.sh"
    trained = sum(bool(arm.pretrainings) for arm in plan.arms) * len(plan.encoders) * len(plan.protocol.seeds)
    assert f"--array=1-{trained} " in Path("whole.submit.sh").read_text()


def test_a_part_that_is_stopped_comes_back_as_that_part(cluster):
    cluster.stand_in(SIGNALS="USR2", SAVES="1")
    path = ROOT / "configs" / "brain_tables" / "ixi.yaml"
    write_job(path, None, Resources(parts=1), submit=True)
    assert cluster.noted("ended")[:2] == ["101_1 75", "101_1 0"]
    assert cluster.calls[0] == cluster.calls[1]
    assert cluster.calls[0][-4:] == ["--stage", "cells", "--part", "1/1"]


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        (Resources(time="soon"), "not a time limit of Slurm"), (Resources(time="9"), "needs at least 600"),
        (Resources(time="9:59"), "599 seconds"), (Resources(parts=2), "only a comparison is divided"),
        (Resources(more=["constraint=a100"]), "begins with a dash"), (Resources(mem="4G\nrm -r /"), "line break"),
        (Resources(setup=["a\nb"]), "line break"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_and_nothing_is_written(cluster, config, resources, said):
    with pytest.raises(ConfigError, match=said):
        write_job(config, None, resources)
    assert not Path("gcl.sbatch").exists()


@pytest.mark.parametrize("time", ["10", "10:00", "0:10:00", "1-0", "0-0:10", "0-0:10:00"])
def test_every_form_of_a_time_limit_is_read(cluster, config, time):
    write_job(config, None, Resources(time=time))
    assert f"#SBATCH --time={time}\n" in Path("gcl.sbatch").read_text()


def test_without_slurm_a_script_can_be_written_but_not_submitted(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no `sbatch` here"):
        write_job(config, None, Resources(), submit=True)
    assert not Path("gcl.sbatch").exists()
    assert "next: sbatch gcl.sbatch" in write_job(config, None, Resources()).text()
    with pytest.raises(ConfigError, match="exists already"):
        write_job(config, None, Resources())


def test_what_sbatch_refuses_is_told(cluster, config):
    cluster.program("sbatch", '#!/bin/bash\necho "invalid partition specified: gpuu" >&2\nexit 1\n')
    with pytest.raises(MedsslError, match="invalid partition specified: gpuu"):
        write_job(config, None, Resources(partition="gpuu"), submit=True)


def test_the_script_is_bash_without_errors(cluster, config):
    for path in (config, ROOT / "configs" / "brain_tables" / "ixi.yaml"):
        for script in write_job(path, None, Resources()).to_json()["scripts"]:
            assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
