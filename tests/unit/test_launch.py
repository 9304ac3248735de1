"""Launchers hand torchrun what their platform says, and the environment of the device; nothing the user set is lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
LAUNCHERS = ["local.sh", "multinode.sh", "slurm.sh", "modelarts.sh", "kubernetes.sh"]
STALE = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A PATH whose torchrun prints its arguments and environment as JSON, and whose scontrol expands a node list."""
    folder = tmp_path_factory.mktemp("bin")
    torchrun = f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
    (folder / "torchrun").write_text(torchrun)
    (folder / "scontrol").write_text(
        '#!/bin/sh\n[ "$1 $2" = "show hostnames" ] && printf "node07\\nnode08\\nnode11\\n"\n'
    )
    for tool in folder.iterdir():
        tool.chmod(0o755)
    return f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin"


@pytest.fixture
def launch(path):
    def run(script: str, *arguments: str, **environment: str) -> tuple[list[str], dict[str, str]]:
        """Return torchrun's arguments and its environment."""
        ran = subprocess.run(
            [str(LAUNCH / script), *arguments], env={"PATH": path, "HOME": "/nonexistent", **environment},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        arguments, environment = json.loads(ran.stdout)
        assert not STALE & set(environment)
        assert not [name for name in environment if name.startswith("PET_")]
        return arguments, environment

    return run


@pytest.fixture
def refuse(path):
    def run(script: str, *arguments: str, **environment: str) -> str:
        """Return the one line with which a launcher stops before torchrun."""
        ran = subprocess.run(
            [str(LAUNCH / script), *arguments], env={"PATH": path, "HOME": "/nonexistent", **environment},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (ran.returncode, ran.stdout) == (2, "")
        assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1
        return ran.stderr

    return run


def node(
    host: bool, nodes: int, endpoint: str, job: str, per_node: int, restarts: int = 0, address: str = ""
) -> list[str]:
    own = ["--local-addr", address] if address else []
    return [
        "--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", job,
        "--rdzv-conf", f"is_host={str(host).lower()},join_timeout=1800", *own,
        "--nproc-per-node", str(per_node), "--max-restarts", str(restarts), "-m", "pipeline",
    ]  # fmt: skip


def standalone(per_node: int, restarts: int = 0) -> list[str]:
    return [
        "--standalone", "--nproc-per-node", str(per_node), "--max-restarts", str(restarts), "-m", "pipeline",
    ]  # fmt: skip


def test_local_starts_one_process_on_a_cpu_and_one_per_visible_device(launch):
    assert launch("local.sh", "device=cpu", "run=a b")[0] == [*standalone(1), "device=cpu", "run=a b"]
    arguments, _ = launch("local.sh", "device=npu", ASCEND_RT_VISIBLE_DEVICES="0,3,5")
    assert arguments == [*standalone(3), "device=npu"]
    assert launch("local.sh", "device=cuda", CUDA_VISIBLE_DEVICES="1,2")[0] == [*standalone(2), "device=cuda"]


def test_options_may_stand_anywhere_and_the_rest_goes_to_the_pipeline(launch):
    arguments, _ = launch("local.sh", "run=a", "--max-restarts=2", "device=cpu", "--nproc-per-node", "4", "--multirun")
    assert arguments == [*standalone(4, 2), "run=a", "device=cpu", "--multirun"]
    assert launch("local.sh", "device=cpu", "--", "--help")[0] == [*standalone(1), "device=cpu", "--help"]


def test_the_environment_of_the_device_is_set_and_the_users_own_values_stay(launch):
    _, npu = launch("local.sh", "device=npu", ASCEND_RT_VISIBLE_DEVICES="0", TASK_QUEUE_ENABLE="0")
    assert npu["HCCL_CONNECT_TIMEOUT"] == "1800" and npu["CPU_AFFINITY_CONF"] == "1"
    assert npu["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"
    assert npu["TASK_QUEUE_ENABLE"] == "0" and "HCCL_EVENT_TIMEOUT" not in npu
    _, patient = launch("local.sh", "device=npu", ASCEND_RT_VISIBLE_DEVICES="0", HCCL_EXEC_TIMEOUT="3000")
    assert int(patient["HCCL_EVENT_TIMEOUT"]) > int(patient["HCCL_EXEC_TIMEOUT"]) == 3000
    _, cuda = launch("local.sh", "device=cuda", CUDA_VISIBLE_DEVICES="0")
    assert cuda["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    _, own = launch("local.sh", "device=cuda", CUDA_VISIBLE_DEVICES="0", PYTORCH_ALLOC_CONF="max_split_size_mb:64")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in own
    _, cpu = launch("local.sh", "device=cpu")
    assert not [name for name in cpu if name.startswith(("HCCL", "PYTORCH_", "TASK_QUEUE"))]


def test_the_environment_of_cann_is_sourced_unless_it_was(launch, tmp_path):
    (tmp_path / "Ascend/cann").mkdir(parents=True)
    (tmp_path / "Ascend/cann/set_env.sh").write_text('export ASCEND_HOME_PATH="$HOME/Ascend/cann${UNKNOWN}"\n')
    at_home = dict(HOME=str(tmp_path), ASCEND_RT_VISIBLE_DEVICES="0")
    assert launch("local.sh", "device=npu", **at_home)[1]["ASCEND_HOME_PATH"] == f"{tmp_path}/Ascend/cann"
    _, elsewhere = launch("local.sh", "device=npu", **at_home, ASCEND_HOME_PATH="/opt/cann")
    assert elsewhere["ASCEND_HOME_PATH"] == "/opt/cann"


def test_dry_run_prints_the_command_as_a_shell_reads_it(path):
    ran = subprocess.run(
        [str(LAUNCH / "local.sh"), "device=cpu", "run=a b"], env={"PATH": path, "DRY_RUN": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout.strip() == "torchrun " + " ".join(standalone(1)) + r" device=cpu run=a\ b"


def test_multinode_takes_its_rank_from_the_list_or_from_the_option(launch):
    own = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
    arguments, _ = launch("multinode.sh", "--hosts", f"first,{own}", "--nproc-per-node", "2", "device=cpu")
    assert arguments == [*node(False, 2, "first:29500", "pipeline", 2, address=own), "device=cpu"]
    arguments, _ = launch(
        "multinode.sh", "--hosts", "10.0.0.1,10.0.0.2", "--node-rank", "0", "--port", "29777", "--job", "mine",
        "--max-restarts", "3", "device=npu", ASCEND_RT_VISIBLE_DEVICES="0,1,2,3",
    )  # fmt: skip
    assert arguments == [*node(True, 2, "10.0.0.1:29777", "mine", 4, 3, "10.0.0.1"), "device=npu"]


@pytest.mark.parametrize("place", [0, 2])
def test_slurm_maps_nodes_not_tasks(launch, place):
    job = dict(SLURM_JOB_NODELIST="node[07-08,11]", SLURM_NNODES="3", SLURM_NODEID=str(place), SLURM_JOB_ID="41250")
    stale = dict(RANK="9", WORLD_SIZE="3", LOCAL_RANK="0", MASTER_ADDR="elsewhere", MASTER_PORT="1")
    arguments, _ = launch("slurm.sh", "device=cpu", SLURM_NTASKS="3", SLURMD_NODENAME="node08", **job, **stale)
    assert arguments == [*node(place == 0, 3, "node07:29750", "slurm-41250", 1, address="node08"), "device=cpu"]


@pytest.mark.parametrize("devices", [dict(LOCAL_WORLD_SIZE="8"), dict(LOCAL_RANK="{0,1,2,3,4,5,6,7}")])
def test_an_ascendjob_gives_a_node_rank_and_counts_all_npus(launch, devices):
    pod = dict(RANK="1", WORLD_SIZE="16", MASTER_ADDR="10.1.2.3", MASTER_PORT="2222", **devices)
    arguments, _ = launch("kubernetes.sh", "device=npu", JOB_NAME="j", POD_IP="10.1.2.4", **pod)
    assert arguments == [*node(False, 2, "10.1.2.3:2222", "j", 8, address="10.1.2.4"), "device=npu"]


def test_a_pytorchjob_speaks_through_torchruns_own_variables(launch):
    pod = dict(
        RANK="0", WORLD_SIZE="16", MASTER_ADDR="job-master-0", MASTER_PORT="23456", PET_NNODES="2", PET_NODE_RANK="0",
        PET_NPROC_PER_NODE="8", PET_MASTER_ADDR="job-master-0", PET_MASTER_PORT="23456",
    )  # fmt: skip
    arguments, _ = launch("kubernetes.sh", "--max-restarts=3", "device=cuda", **pod)
    assert arguments == [*node(True, 2, "job-master-0:23456", "pipeline", 8, 3), "device=cuda"]


def test_modelarts_lists_its_hosts_first_one_first(launch):
    job = dict(MA_NUM_HOSTS="2", VC_TASK_INDEX="1", VC_WORKER_HOSTS="job-0.svc,job-1.svc", MA_NUM_GPUS="8")
    arguments, _ = launch("modelarts.sh", "device=npu", MA_VJ_NAME="v", **job)
    assert arguments == [*node(False, 2, "job-0.svc:29500", "v", 8, address="job-1.svc"), "device=npu"]
    assert launch("modelarts.sh", "device=npu", MA_NUM_HOSTS="1", MA_NUM_GPUS="8")[0] == [*standalone(8), "device=npu"]


def test_what_cannot_work_stops_before_torchrun_and_names_the_remedy(refuse):
    pod = dict(RANK="0", WORLD_SIZE="12", MASTER_ADDR="a", MASTER_PORT="1")
    job = dict(SLURM_JOB_NODELIST="n[1-2]", SLURM_NNODES="2", SLURM_NODEID="0", SLURM_JOB_ID="7")
    assert "device is 'tpu'" in refuse("local.sh", "device=tpu")
    assert "--max-restarts is 'x'" in refuse("local.sh", "--max-restarts", "x")
    assert "no value" in refuse("local.sh", "--nproc-per-node")
    if not Path("/dev/davinci0").exists():
        assert "no npu device is visible" in refuse("local.sh", "device=npu")
    assert "--hosts is missing" in refuse("multinode.sh")
    assert "give --node-rank" in refuse("multinode.sh", "--hosts", "nowhere.invalid,elsewhere.invalid")
    assert "rank is '2' of 2 nodes" in refuse("multinode.sh", "--hosts", "a,b", "--node-rank", "2", "device=cpu")
    assert "SLURM_JOB_NODELIST is not set" in refuse("slurm.sh")
    assert "--ntasks-per-node=1" in refuse("slurm.sh", **job, SLURM_NTASKS="16")
    assert "MASTER_ADDR is not set" in refuse("kubernetes.sh")
    assert "neither PET_NNODES" in refuse("kubernetes.sh", **pod)
    assert "not a multiple" in refuse("kubernetes.sh", **pod, LOCAL_WORLD_SIZE="8")
    assert "VC_TASK_INDEX is not set" in refuse("modelarts.sh", MA_NUM_HOSTS="2")


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_needs_nothing(script, path):
    ran = subprocess.run([str(LAUNCH / script), "--help"], env={"PATH": path}, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.startswith("usage: ") and "--max-restarts" in ran.stdout


@pytest.mark.parametrize(
    "name, kind, container", [("ascendjob", "AscendJob", "ascend"), ("pytorchjob", "PyTorchJob", "pytorch")]
)
def test_kubernetes_jobs_run_the_launcher_on_every_pod(name, kind, container, launch):
    job = yaml.safe_load((LAUNCH / f"kubernetes/{name}.yaml").read_text())
    assert job["kind"] == kind
    replicas = job["spec"].get("replicaSpecs") or job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    for replica in replicas.values():
        (pod,) = replica["template"]["spec"]["containers"]
        assert pod["name"] == container
        assert pod["command"][0].startswith("/app/launch/")  # where the images put it
        assert {"JOB_NAME", "POD_IP"} <= {variable["name"] for variable in pod["env"]}
        devices = next(iter(pod["resources"]["limits"].values()))
        assert pod["resources"]["requests"] == pod["resources"]["limits"]
        where = dict(RANK="0", WORLD_SIZE=str(2 * devices), MASTER_ADDR="m", MASTER_PORT="2222")
        arguments, _ = launch(Path(pod["command"][0]).name, *pod["args"], **where, LOCAL_WORLD_SIZE=str(devices))
        assert arguments[: -len(pod["args"]) + 1] == node(True, 2, "m:2222", "pipeline", devices, 3)


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    scripts = [str(path) for path in (*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch"), ROOT / "docker/run.sh")]
    ran = subprocess.run([SHELLCHECK, "-x", *scripts], cwd=LAUNCH, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
