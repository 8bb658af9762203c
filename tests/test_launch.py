"""The launchers, without a cloud: what they would run, what they do when the machines go away, what they render."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import yaml

from launch.gke import __main__ as gke
from launch.gke.jobset import slices

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections reads configs so
ROOT = Path(__file__).parent.parent
PLACE = ["--name=kd", "--project=my-project", "--zone=us-west4-a"]
GIVEN = ["--config=configs/tiny.py", "--workdir=gs://bucket/my dir"]
HARD = '--config.title=it\'s $(touch /tmp/never) `y`; & "q" \\ *\n#'
PLAN = [ROOT / "README.md", ROOT / "docs" / "plans.md"]
CONFIGS = re.compile(r"configs/(?:gpt2_kd|opt_kd|llama2_kd)\.py(?::\w[\w.,]*\w)?")

# What stands in for main.py: notes its arguments and ends as $CLOUD/plan says, a line for each start on this worker.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
cloud, worker = Path(os.environ["CLOUD"]), os.environ["WORKER"]
seen = cloud / f"starts-{worker}"
with seen.open("a") as file:
    assert sys.argv[1] == "--distributed"
    file.write(json.dumps(sys.argv[2:]) + "\\n")
steps = (cloud / "plan").read_text().splitlines()
what = steps[min(len(seen.read_text().splitlines()), len(steps)) - 1].split()
what = what[min(int(worker[1:]), len(what) - 1)]
if what == "taken":
    (cloud / "state").write_text("SUSPENDED\\n")
    time.sleep(0.5)
elif what.startswith("sleep"):
    time.sleep(float(what[5:]))
elif what == "saves":  # a last checkpoint, which takes its time
    def save(*_):
        time.sleep(1)
        (cloud / "saved").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, save)
    (cloud / "ready").touch()
    time.sleep(90)
elif what == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (cloud / "ready").touch()
    time.sleep(90)
elif what == "0" and not any(a.startswith("--stages=") for a in sys.argv):
    (cloud / "bucket" / "report").mkdir(parents=True, exist_ok=True)
    (cloud / "bucket" / "report" / "summary.txt").write_text("leaks")
else:
    sys.exit(int(what))
"""


class Cloud:
    """A checkout with the launchers and a tiny program, and a fake gcloud in front of the PATH."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder / "cloud", folder / "bin"
        self.root = folder / "checkout with spaces"
        shutil.copytree(ROOT / "launch", self.root / "launch", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("attacks", "configs", "kd_jax", "runs"):
            (self.root / name).mkdir()
        (self.root / "configs/tiny.py").write_text("")
        (self.root / "runs/private.jsonl").write_text("{}")
        (self.root / "main.py").write_text(PROGRAM)
        (self.root / "requirements.txt").write_text("numpy\n")
        (self.root / "requirements-tpu.txt").write_text("jax[tpu]\n")
        self.folder.mkdir()
        self.bin.mkdir()
        shutil.copy(ROOT / "tests" / "fake_gcloud.sh", self.bin / "gcloud")
        for name, text in {"hostname": "echo $WORKER", "python3.11": "exit 0"}.items():
            (self.bin / name).write_text(f"#!/bin/sh\n{text}\n")
            (self.bin / name).chmod(0o755)
        self.environment = {
            "PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin", "CLOUD": str(self.folder), "WORKERS": "1",
            "HOME": str(folder), "REAL_PYTHON": sys.executable, "STOP_SECONDS": "5",
        }  # fmt: skip

    def command(self, *arguments: str) -> list[str]:
        return ["bash", str(self.root / "launch" / "tpu_vm.sh"), *arguments]

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*arguments), env=self.environment | environment, capture_output=True, text=True, timeout=60
        )

    def up(self, plan: list[str], topology: str = "v5e:2x4", *more: str, **environment: str):
        (self.folder / "plan").write_text("\n".join(plan))
        out = f"--out={self.folder / 'out'}"
        return self("up", *PLACE, *GIVEN, f"--topology={topology}", "--poll=0", out, *more, **environment)

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """What changed the slice, in order."""
        return [c[3] for c in self.calls if c[2:3] == ["queued-resources"] and c[3] != "describe"]

    def starts(self, worker: int = 0) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / f"starts-w{worker}").read_text().splitlines()]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


# --- the table


def test_topologies_agree_with_their_shapes():
    rows = slices()
    assert {"v5e:8x8", "v5p:4x4x4", "v6e:4x4", "v4:4x4x4"} <= set(rows)
    prefix = {"v4": "v4", "v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
    runtime = {
        "v4": "tpu-ubuntu2204-base", "v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e",
    }  # fmt: skip
    for name, row in rows.items():
        generation, shape = name.split(":")
        chips = math.prod(map(int, shape.split("x")))
        assert chips == row.hosts * row.chips_per_host, name
        assert row.accelerator_type == f"{prefix[generation]}-{chips * (2 if generation in ('v4', 'v5p') else 1)}"
        assert row.runtime == runtime[generation]
        assert row.chips_per_host == 4 or (row.chips_per_host == 8 and row.hosts == 1)
        assert row.machine.endswith(f"-{row.chips_per_host}t")
    assert [rows[t].accelerator_type for t in ("v5e:8x8", "v5p:4x4x4", "v6e:4x4", "v4:4x4x4")] == [
        "v5litepod-64", "v5p-128", "v6e-16", "v4-128",
    ]  # fmt: skip


# --- tpu_vm.sh: what it would run


def test_dry_run_prints_the_commands_in_order_and_runs_none(cloud):
    done = cloud("up", *PLACE, *GIVEN, "--topology=v5e:8x8", "--spot", "--dry-run", HARD, "--", "--stages=train,score")
    assert done.returncode == 0 and not cloud.calls, done.stderr
    assert list(cloud.folder.iterdir()) == []
    commands = [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]
    place = PLACE[1:]
    create = ["gcloud", "compute", "tpus", "queued-resources", "create", "kd", "--node-id=kd", *place]
    assert commands[0][:9] == create
    assert set(commands[0][9:]) == {
        "--accelerator-type=v5litepod-64", "--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--quiet",
    }  # fmt: skip
    kinds = [c[3:5] if c[:3] == ["gcloud", "compute", "tpus"] else c[:2] for c in commands]
    assert kinds == [
        ["queued-resources", "create"], ["queued-resources", "describe"], ["tpu-vm", "describe"],
        ["env", "COPYFILE_DISABLE=1"], ["tpu-vm", "scp"], ["tpu-vm", "ssh"],
        ["tpu-vm", "ssh"], ["tpu-vm", "ssh"],
        ["mkdir", "-p"], ["gcloud", "storage"], ["queued-resources", "delete"],
    ]  # fmt: skip
    assert all("--worker=all" in c for c in commands if c[4:5] in (["ssh"], ["scp"]))
    assert all(place <= [a for a in c if a in place] for c in commands if c[:3] == ["gcloud", "compute", "tpus"])
    assert commands[-2][:6] == ["gcloud", "storage", "cp", "--recursive", "gs://bucket/my dir/report", "runs/kd"]
    assert commands[-1][5:] == ["kd", *place, "--force", "--quiet"]


@pytest.mark.parametrize("verb", ["create", "setup", "run", "status", "logs", "stop", "fetch", "delete"])
def test_every_verb_has_a_dry_run(cloud, verb):
    done = cloud(verb, *PLACE, *GIVEN, "--topology=v4:2x2x1", "--dry-run")
    assert done.returncode == 0 and done.stdout and not cloud.calls, done.stderr
    assert all(shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#"))


def test_help_names_every_verb_and_flag(cloud):
    script = (cloud.root / "launch" / "tpu_vm.sh").read_text()
    verbs = re.search(r"^    (up \| .*)\) ;;$", script, re.M)[1].split(" | ")
    flags = re.findall(r"^        (--[a-z-]+)[=*)]", script, re.M)
    told = cloud("help").stdout
    assert len(verbs) == 9 and len(flags) > 15
    for word in [*verbs, *flags]:
        assert re.search(rf"(^|\W){re.escape(word)}\b", told, re.M), word


def test_a_slice_is_asked_for_without_spot_unless_told(cloud):
    done = cloud("create", *PLACE, "--topology=v5p:4x4x4", "--dry-run", "--create-flag=--network=my net")
    words = shlex.split(done.stdout.splitlines()[0])
    assert "--spot" not in words and "--accelerator-type=v5p-128" in words and "--network=my net" in words


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["destroy", *PLACE], "unknown verb destroy"),
        (["delete", *PLACE[1:]], "--name is missing"),
        (["delete", *PLACE[:2]], "--zone is missing"),
        (["delete", "--name=*", *PLACE[1:]], "--name=*: not a valid value"),
        (["delete", "--name=--all", *PLACE[1:]], "not a valid value"),
        (["delete", *PLACE, "--force"], "unknown flag --force"),
        (["create", *PLACE], "--topology is missing"),
        (["create", *PLACE, "--topology=v5e:3x3"], "known are"),
        (["create", *PLACE, "--topology=gpu:8"], "known are"),
        (
            ["run", *PLACE, *GIVEN, "--topology=v5e:8x8", "--workdir=runs/x"],
            "16 workers, which share the work directory",
        ),
        (["up", *PLACE, *GIVEN, "--topology=v5e:2x4", "--workdir=runs/x"], "up deletes the slice"),
        (["run", *PLACE, *GIVEN, "--topology=v5e:2x4", "--workdir=runs/x", "--spot"], "a spot slice is taken away"),
        (["create", *PLACE, "--topology=v5e:2x4", "--workdir=runs/x", "--spot"], "a spot slice is taken away"),
        (["run", *PLACE, "--topology=v5e:8x8", "--workdir=gs://b/x"], "--config is missing"),
        (["run", *PLACE, "--topology=v5e:8x8", "--config=configs/tiny.py"], "--workdir is missing"),
        (["run", *PLACE, *GIVEN, "--topology=v5e:8x8", "--config=configs/typo.py:x"], "no such file"),
        (["run", *PLACE, *GIVEN, "--topology=v5e:8x8", "--stages=train"], "go after --"),
        (["setup", *PLACE, "--copy=../secrets"], "inside the checkout"),
        (["setup", *PLACE, "--copy=/etc/passwd"], "inside the checkout"),
        (["setup", *PLACE, "--copy=data.jsonl"], "no such file"),
        (["run", *PLACE, *GIVEN, "--topology=v5e:8x8", "--poll=1;x"], "--poll=1;x: not a valid value"),
    ],
)
def test_mistakes_are_named_before_anything_runs(cloud, arguments, message):
    done = cloud(*arguments)
    assert done.returncode == 2 and message in done.stderr and not cloud.calls


def test_a_missing_gcloud_is_named(cloud):
    (cloud.bin / "gcloud").unlink()
    for tool in ("bash", "dirname", "sed", "awk", "date"):
        (cloud.bin / tool).symlink_to(shutil.which(tool))
    done = cloud("delete", *PLACE, PATH=str(cloud.bin))
    assert done.returncode == 2 and "gcloud is not on the PATH" in done.stderr


# --- tpu_vm.sh: what it does


def test_up_creates_runs_fetches_and_deletes_and_passes_every_setting_whole(cloud):
    done = cloud.up(["0"], "v5e:4x4", HARD, "--", "--stages=train,score", "--only=", WORKERS="4")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "delete"] and not (cloud.folder / "state").exists()
    for worker in range(4):
        assert cloud.starts(worker) == [[*GIVEN, HARD, "--stages=train,score", "--only="]]
    assert "no report came" in done.stderr and "in gs://bucket/my dir" in done.stderr
    assert not Path("/tmp/never").exists()


def test_up_brings_the_report_home_and_then_deletes_the_slice(cloud):
    done = cloud.up(["0"])
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert (cloud.folder / "out" / "report" / "summary.txt").read_text() == "leaks"
    assert cloud.verbs() == ["create", "delete"] and cloud.calls[-1][3] == "delete"


def test_a_slice_that_is_kept_is_said_to_cost_money(cloud):
    done = cloud.up(["0"], "v5e:2x4", "--keep")
    assert done.returncode == 0 and cloud.verbs() == ["create"] and "costs money" in done.stderr


def test_one_worker_may_use_its_own_disk_where_nothing_deletes_it(cloud):
    done = cloud("run", *PLACE, *GIVEN, "--topology=v5e:2x4", "--workdir=runs/x", "--dry-run")
    assert done.returncode == 0 and "--workdir=runs/x" in done.stdout, done.stderr


def test_only_the_program_is_copied_and_it_replaces_what_was_there(cloud):
    done = cloud("create", *PLACE, "--topology=v5e:2x4", "--poll=0")
    there = cloud.folder / "w0" / "kd_jax"
    (there / "kd_jax").mkdir()
    (there / "kd_jax" / "gone.py").write_text("")
    (cloud.folder / "token").write_text("hf_x")
    done = cloud("setup", *PLACE, "--copy=runs/private.jsonl", f"--hf-token={cloud.folder / 'token'}")
    assert done.returncode == 0, done.stderr
    assert "hf_x" not in str(cloud.calls)
    assert sorted(p.name for p in there.iterdir()) == [
        ".venv", "attacks", "configs", "hf_token", "kd_jax", "launch", "log", "main.py", "requirements-tpu.txt",
        "requirements.txt", "runs",
    ]  # fmt: skip
    assert not (there / "kd_jax" / "gone.py").exists() and not (cloud.folder / "w0" / "kd_jax.tgz").exists()
    assert (there / "hf_token").stat().st_mode & 0o077 == 0
    shutil.rmtree(there / "runs")
    assert cloud("setup", *PLACE).returncode == 0
    assert not (there / "runs").exists(), "records travel only where --copy names them"


def test_exit_75_runs_the_same_command_again_on_the_same_slice(cloud):
    done = cloud.up(["75", "75", "0"])
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "delete"]
    assert cloud.starts() == [GIVEN] * 3


def test_a_preempted_slice_is_deleted_asked_for_again_and_the_run_continued(cloud):
    done = cloud.up(["taken", "0"], "v5e:2x4", "--spot")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "delete", "create", "delete"]
    requests = [c for c in cloud.calls if "create" in c]
    assert requests[0] == requests[1] and "--spot" in requests[0]
    assert cloud.starts() == [GIVEN] * 2


def test_restarts_have_an_end(cloud):
    done = cloud.up(["75"], "v5e:2x4", "--restarts=2")
    assert done.returncode == 75 and len(cloud.starts()) == 3
    assert "preempted 3 times" in done.stderr and cloud.verbs() == ["create"]


def test_any_other_code_stops_and_leaves_the_slice_to_be_looked_at(cloud):
    done = cloud.up(["1"])
    assert done.returncode == 1 and len(cloud.starts()) == 1
    assert cloud.verbs() == ["create"] and "costs money" in done.stderr
    assert not any(c[0] == "storage" for c in cloud.calls)


def test_of_several_workers_the_cause_is_reported(cloud):
    assert cloud.up(["134 3"], "v4:2x2x2", WORKERS="2").returncode == 3


def test_one_preempted_worker_is_enough_to_start_again(cloud):
    done = cloud.up(["134 75", "0"], "v4:2x2x2", WORKERS="2")
    assert done.returncode == 0 and len(cloud.starts(0)) == len(cloud.starts(1)) == 2


def test_workers_that_wait_for_a_failed_one_are_stopped(cloud):
    done = cloud.up(["3 sleep90"], "v4:2x2x2", WORKERS="2")
    assert done.returncode == 3, done.stderr


def test_the_program_survives_the_connection_and_run_finds_it_again(cloud):
    (cloud.folder / "plan").write_text("sleep2")
    assert cloud("create", *PLACE, "--topology=v5e:2x4", "--poll=0").returncode == 0
    assert cloud("setup", *PLACE).returncode == 0
    run = ["run", *PLACE, *GIVEN, "--topology=v5e:2x4", "--poll=0"]
    first = subprocess.Popen(
        cloud.command(*run), env=cloud.environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not (cloud.folder / "starts-w0").exists():
        time.sleep(0.05)
    os.killpg(first.pid, 9)
    first.wait()
    other = cloud(*run, "--config.seed=1")
    assert other.returncode == 1 and "runs another command" in other.stderr
    again = cloud(*run)
    assert again.returncode == 0, again.stderr
    assert cloud.starts() == [GIVEN]
    assert "main.py --distributed --config=configs/tiny.py" in (cloud.folder / "w0/kd_jax/log/w0.log").read_text()
    assert cloud("logs", *PLACE, "--lines=5").stdout.startswith("== ")


def start(cloud, until: str) -> subprocess.Popen:
    """`run` in the background, returned when the file `until` is there."""
    run = cloud.command("run", *PLACE, *GIVEN, "--topology=v5e:2x4", "--poll=0")
    running = subprocess.Popen(run, env=cloud.environment, stderr=subprocess.DEVNULL)
    while not (cloud.folder / until).exists():
        time.sleep(0.05)
    return running


def test_a_stopped_program_is_not_started_again(cloud):
    (cloud.folder / "plan").write_text("sleep90")
    assert cloud("create", *PLACE, "--topology=v5e:2x4", "--poll=0").returncode == 0
    assert cloud("setup", *PLACE).returncode == 0
    running = start(cloud, until="starts-w0")
    assert "running" in cloud("status", *PLACE).stdout
    assert cloud("stop", *PLACE).returncode == 0
    assert running.wait(30) == 143


@pytest.mark.parametrize("what, seconds, saved", [("saves", "30", True), ("deaf", "1", False)])
def test_stop_gives_the_program_its_time_and_then_ends_it(cloud, what, seconds, saved):
    (cloud.folder / "plan").write_text(what)
    assert cloud("create", *PLACE, "--topology=v5e:2x4", "--poll=0").returncode == 0
    assert cloud("setup", *PLACE).returncode == 0
    running = start(cloud, until="ready")
    started = time.monotonic()
    assert cloud("stop", *PLACE, STOP_SECONDS=seconds).returncode == 0
    assert time.monotonic() - started < 15 and (cloud.folder / "saved").exists() == saved
    assert running.wait(30) == 143, "stopped on purpose, so not 75"


def test_both_launchers_give_the_same_time_for_a_last_checkpoint():
    told = re.search(r"STOP_SECONDS:-(\d+)", (ROOT / "launch" / "tpu_worker.sh").read_text())[1]
    assert int(told) == parts(render())[1]["terminationGracePeriodSeconds"] == 120


def test_without_an_answer_nothing_is_created_or_deleted(cloud):
    done = cloud.up(["0"], DENIED="yes")
    assert done.returncode == 1 and done.stderr.count("PERMISSION_DENIED") == 10 and cloud.verbs() == []
    assert "costs money" in " ".join(done.stderr.split()) and "launch/tpu_vm.sh delete --name=kd" in done.stderr


def test_waiting_survives_up_to_nine_silences_in_a_row(cloud):
    (cloud.folder / "answers").write_text("-" * 9 + "+" + "-" * 9)  # before the request is made, and after
    done = cloud.up(["0"])
    assert done.returncode == 0 and done.stderr.count("UNAVAILABLE") == 18, done.stderr
    assert cloud.verbs() == ["create", "delete"]


def test_a_slice_that_its_user_stopped_is_left_alone(cloud):
    assert cloud("create", *PLACE, "--topology=v5e:2x4", "--poll=0").returncode == 0
    (cloud.folder / "node").write_text("STOPPED\n")
    for done in (cloud.up(["0"]), cloud("create", *PLACE, "--topology=v5e:2x4", "--poll=0")):
        assert done.returncode == 1 and "gcloud compute tpus tpu-vm start kd --project" in done.stderr
    assert cloud.verbs() == ["create"]
    (cloud.folder / "node").unlink()
    assert cloud.up(["0"]).returncode == 0


def test_a_refused_request_stops(cloud):
    done = cloud.up(["0"], CREATED_STATE="FAILED")
    assert done.returncode == 1 and "refused the request" in done.stderr and cloud.verbs() == ["create"]


def test_delete_names_one_thing(cloud):
    cloud("create", *PLACE, "--topology=v5e:2x4", "--poll=0")
    (cloud.folder / "calls").unlink()
    assert cloud("delete", *PLACE).returncode == 0
    assert cloud.calls == [["compute", "tpus", "queued-resources", "delete", "kd", *PLACE[1:], "--force", "--quiet"]]


# --- gke

# Field names and types by the documentation of JobSet v1alpha2, and of Job and Pod where it embeds them.
ANY = dict.fromkeys  # a map of strings
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "namespace": str, "labels": ANY, "annotations": ANY},
    "spec": {
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "successPolicy": {"operator": str, "targetReplicatedJobs": [str]},
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": str,
            "rules": [
                {
                    "name": str,
                    "action": str,
                    "onJobFailureReasons": [str],
                    "onJobFailureMessagePatterns": [str],
                    "targetReplicatedJobs": [str],
                }
            ],
        },
        "suspend": bool,
        "ttlSecondsAfterFinished": int,
        "replicatedJobs": [
            {
                "name": str,
                "groupName": str,
                "replicas": int,
                "template": {
                    "metadata": {"labels": ANY, "annotations": ANY},
                    "spec": {
                        "parallelism": int,
                        "completions": int,
                        "completionMode": str,
                        "backoffLimit": int,
                        "activeDeadlineSeconds": int,
                        "podFailurePolicy": {
                            "rules": [
                                {
                                    "action": str,
                                    "onExitCodes": {"containerName": str, "operator": str, "values": [int]},
                                    "onPodConditions": [{"type": str, "status": str}],
                                }
                            ]
                        },
                        "template": {
                            "metadata": {"labels": ANY, "annotations": ANY},
                            "spec": {
                                "restartPolicy": str,
                                "shareProcessNamespace": bool,
                                "serviceAccountName": str,
                                "terminationGracePeriodSeconds": int,
                                "nodeSelector": ANY,
                                "tolerations": [{"key": str, "operator": str, "value": str, "effect": str}],
                                "containers": [
                                    {
                                        "name": str,
                                        "image": str,
                                        "workingDir": str,
                                        "command": [str],
                                        "args": [str],
                                        "env": [
                                            {
                                                "name": str,
                                                "value": str,
                                                "valueFrom": {"secretKeyRef": {"name": str, "key": str}},
                                            }
                                        ],
                                        "resources": {"limits": {"google.com/tpu": int}},
                                        "securityContext": {"allowPrivilegeEscalation": bool},
                                    }
                                ],
                            },
                        },
                    },
                },
            }
        ],
    },
}


def conforms(value, schema, where="manifest"):
    if schema is ANY:
        assert all(isinstance(k, str) and isinstance(v, str) for k, v in value.items()), where
    elif isinstance(schema, dict):
        assert not set(value) - set(schema), f"{where}: fields that JobSet does not document"
        for key, inner in value.items():
            conforms(inner, schema[key], f"{where}.{key}")
    elif isinstance(schema, list):
        for inner in value:
            conforms(inner, schema[0], f"{where}[]")
    else:
        assert type(value) is schema, where


def render(*more: str, config: str = "configs/llama2_kd.py", topology: str = "v5e:8x8") -> dict:
    text = gke.main([f"--config={config}", f"--topology={topology}", "--workdir=gs://b/x y", "--image=r/i:1", *more])
    return yaml.safe_load(text)


def parts(manifest: dict) -> tuple[dict, dict, dict]:
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    return job, pod, pod["containers"][0]


def test_a_manifest_asks_for_one_pod_on_each_host():
    manifest = render("--spot", "--service-account=kd", "--hf-secret=hf")
    conforms(manifest, JOBSET)
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and manifest["kind"] == "JobSet"
    job, pod, container = parts(manifest)
    assert job["completions"] == job["parallelism"] == 16 and job["completionMode"] == "Indexed"
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "8x8",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["serviceAccountName"] == "kd"
    assert manifest["spec"]["network"] == {"enableDNSHostnames": True, "subdomain": manifest["metadata"]["name"]}
    assert "privileged" not in yaml.safe_dump(manifest) and "cloud.google.com/gke-spot" not in str(render())


def test_preemptions_and_lost_hosts_restart_and_all_else_fails():
    manifest = render("--restarts=7")
    job, pod, container = parts(manifest)
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert pod["shareProcessNamespace"] is True, "as process 1 of its container an aborted program ends with 139"
    rules = job["podFailurePolicy"]["rules"]
    assert all(r["action"] == "FailJob" and len(r) == 2 for r in rules), "a rule has one requirement"
    assert rules[0]["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [75, 134]}
    assert rules[1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    actions = [(r["action"], r.get("onJobFailureReasons")) for r in policy["rules"]]
    assert actions == [("RestartJobSet", ["PodFailurePolicy"]), ("FailJobSet", None)]
    assert all(re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", r["name"]) for r in policy["rules"])


def test_settings_reach_the_program_word_by_word():
    title = '--config.title=it\'s $(HOME) $$ `y` "q"\n#'
    _, _, container = parts(render(title, "--", "--stages=train,score"))
    assert container["command"] == ["python", "-u", "main.py", "--distributed"]
    kubernetes = [a.replace("$$", "$") for a in container["args"]]  # what it makes of an escaped argument
    assert kubernetes == ["--config=configs/llama2_kd.py", "--workdir=gs://b/x y", title, "--stages=train,score"]
    assert all(not re.search(r"(?<!\$)(\$\$)*\$\(", a) for a in container["args"]), "nothing is left to expand"


def test_every_paper_config_and_every_slice_renders():
    named = {c for path in PLAN if path.exists() for c in CONFIGS.findall(path.read_text())}
    named |= {"configs/llama2_kd.py", "configs/llama2_kd.py:openllama,zhang2025", "configs/opt_kd.py:1.3b"}
    for config in named:
        manifest = render(config=config)
        conforms(manifest, JOBSET)
        assert len(f"{manifest['metadata']['name']}-slice-0-63-abcde") <= 63
    for name, row in slices().items():
        job, pod, container = parts(render(topology=name))
        assert job["completions"] * container["resources"]["limits"]["google.com/tpu"] == row.hosts * row.chips_per_host
        assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == name.split(":")[1]


def test_every_slice_of_the_plans_is_known():
    text = PLAN[1].read_text() if PLAN[1].exists() else ""
    assert set(re.findall(r"\b(?:v4|v5e|v5p|v6e):\d+(?:x\d+)+", text)) <= set(slices())


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--topology=v5e:3x3", "known are"),
        ("--workdir=runs/x", "gs://BUCKET/DIR"),
        ("--config=configs/typo.py", "no such file in the checkout"),
        ("--config=configs/llama2_kd.py:typo", "known are openllama"),
        ("--config.sed=1", "sed"),
        ("--config.seed=one", "seed"),
        ("--stages=train", "go after --"),
        ("--name=Upper_case", "--name=Upper_case"),
    ],
)
def test_gke_names_mistakes(capsys, flag, message):
    with pytest.raises(SystemExit) as stopped:
        render(flag)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


# --- the scripts themselves


def test_shell_scripts_pass_shellcheck():
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    if not (shellcheck := shutil.which("shellcheck", path=path)):
        pytest.skip("shellcheck is not installed")
    scripts = [*sorted(ROOT.glob("launch/*.sh")), ROOT / ".ci" / "run", ROOT / "tests" / "fake_gcloud.sh"]
    done = subprocess.run([shellcheck, "-x", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
