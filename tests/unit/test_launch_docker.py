"""Images are built from what .dockerignore lets through and run as a user; docker/run.sh gives them their devices."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.image_steps import BASE_PATH, Image, apply, instructions

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


@pytest.fixture
def docker(tmp_path):
    """Run docker/run.sh with a docker that prints its arguments, one a line; give them."""
    (tmp_path / "docker").write_text(f"#!{sys.executable}\nimport sys\nprint(*sys.argv[1:], sep='\\n')\n")
    (tmp_path / "docker").chmod(0o755)

    def run(*arguments: str, code: int = 0, **environment: str) -> list[str] | str:
        ran = subprocess.run(
            [str(ROOT / "docker/run.sh"), *arguments], cwd=tmp_path, capture_output=True, text=True,
            env={"PATH": f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin", "HOME": str(tmp_path), **environment},
        )  # fmt: skip
        assert ran.returncode == code, ran.stderr
        return ran.stderr if code else ran.stdout.splitlines()

    return run


def values(arguments: list[str], flag: str) -> list[str]:
    return [value for name, value in zip(arguments, arguments[1:]) if name == flag]


def test_an_ascend_container_gets_its_npus_the_managing_devices_and_the_driver(docker, tmp_path):
    arguments = docker("npu", "--devices", "0,3", "run=mine", "--max-restarts=2")
    devices = ["davinci0", "davinci3", "davinci_manager", "devmm_svm", "hisi_hdc"]
    assert values(arguments, "--device") == [f"/dev/{name}" for name in devices]
    inside = {volume.split(":")[1] for volume in values(arguments, "--volume")}
    own = {f"/usr/local/Ascend/driver/{name}" for name in ("lib64", "version.info")}
    own |= {"/usr/local/dcmi", "/usr/local/bin/npu-smi", "/etc/ascend_install.info"}
    assert inside == own | {"/workspace", f"{tmp_path}/.cache/huggingface"}
    assert f"{tmp_path}:/workspace" in values(arguments, "--volume")
    assert values(arguments, "--network") == ["host"] and values(arguments, "--shm-size") == ["64g"]
    assert arguments[-4:] == ["pangu-light:npu", "device=npu", "run=mine", "--max-restarts=2"]


def test_gpus_are_given_by_number_or_all(docker):
    assert values(docker("cuda", "--devices", "0,1"), "--gpus") == ['"device=0,1"']
    assert values(docker("cuda", "--image", "mine:1"), "--gpus") == ["all"]
    assert docker("cuda", "--image", "mine:1")[-2:] == ["mine:1", "device=cuda"]


def test_a_container_runs_as_the_caller_and_sees_secrets_by_name_only(docker):
    arguments = docker("cpu", WANDB_API_KEY="0123456789abcdef")
    assert values(arguments, "--user") == [f"{os.getuid()}:{os.getgid()}"]
    assert "WANDB_API_KEY" in values(arguments, "--env") and "HF_TOKEN" not in values(arguments, "--env")
    assert not [argument for argument in arguments if "0123456789abcdef" in argument]


@pytest.mark.parametrize("given", [None, "hub cache"])
def test_the_hub_cache_of_the_host_is_that_of_the_container_under_its_own_path(docker, tmp_path, given):
    cache = tmp_path / (given or ".cache/huggingface")
    arguments = docker("cpu", **({"HF_HOME": str(cache)} if given else {}))
    assert f"{cache}:{cache}" in values(arguments, "--volume") and "HF_HOME" in values(arguments, "--env")
    assert cache.is_dir()


def test_what_cannot_run_is_refused(docker):
    assert "choose npu, cuda or cpu" in docker("tpu", code=2)
    assert "--devices goes with npu and cuda" in docker("cpu", "--devices", "0", code=2)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_image_copies_what_is_let_through_and_ends_as_a_user(file):
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = [name for line in re.findall(r"^COPY (.+)$", file.read_text(), re.M) for name in line.split()[:-1]]
    assert ignore[0] == "*" and set(copied) == allowed
    assert all((ROOT / name).exists() for name in copied)
    assert re.findall(r"^USER (.+)$", file.read_text(), re.M)[-1] == "1000:1000"  # by number, as runAsNonRoot requires
    assert not re.search(r"(?i)(token|key|password|secret)\s*=", file.read_text())
    base = re.search(r"^(?:ARG CANN=|FROM )(\S+:\S+)$", file.read_text(), re.M).group(1)
    assert re.search(r":[\w.]*\d+\.\d+[\w.-]*$", base)  # a release, not a moving tag


def test_an_installation_holds_every_package():
    """What an image installs is this list; a checkout, which the other tests run from, would not miss one."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "pipeline").rglob("__init__.py")}
    assert set(listed) == there | {"pipeline.conf", "fused"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_image_installs_a_torch_that_the_package_accepts(file):
    wanted = next(
        d for d in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"] if "torch" in d
    )
    low, high = re.fullmatch(r"torch>=([\d.]+),<([\d.]+)", wanted).groups()
    number = lambda text: tuple(map(int, text.split(".")[:2]))  # noqa: E731
    version = re.search(r"\btorch==([\d.]+)", file.read_text()).group(1)
    assert number(low) <= number(version) < number(high)
    pair = re.search(r"torch_npu==([\d.]+)", file.read_text())
    assert pair is None or pair.group(1) == version


HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing():
    ran = subprocess.run([HADOLINT, *map(str, FILES)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def test_continued_lines_are_one_instruction_and_comments_none():
    text = "# about\nFROM a:1\n\nRUN one \\\n    && two \\\n# why\n    && three\nenv A=1\n"
    assert instructions(text) == [("FROM", "a:1"), ("RUN", "one  && two  && three"), ("ENV", "A=1")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_image_holds_what_its_instructions_set_and_copy(file, tmp_path):
    """All but what RUN does, carried out in an empty root."""
    image = Image(tmp_path, {"TORCH_INDEX": "https://mine"}, {"PATH": BASE_PATH})
    for name, rest in instructions(file.read_text()):
        if name != "RUN":
            apply(image, name, rest)
    assert (image.user, image.folder) == ("1000:1000", "/workspace")
    assert (image.entry, image.command) == (["/app/launch/local.sh"], ["--help"])
    assert image.environment["HOME"] == "/home/pangu" and image.locals["TORCH_INDEX"] == "https://mine"
    assert os.access(tmp_path / "app/launch/local.sh", os.X_OK)
    assert (tmp_path / "app/pyproject.toml").is_file() and (tmp_path / "app/kernels/fused/__init__.py").is_file()


@pytest.mark.skipif("IMAGE_ROOT" not in os.environ, reason="IMAGE_ROOT names no clean root folder (see image_steps.py)")
def test_the_steps_of_the_cpu_image_can_be_carried_out():
    """As root, with the network, for minutes; IMAGE_STEPS: further options, such as --bind and --env."""
    script, options = ROOT / "tests/image_steps.py", shlex.split(os.environ.get("IMAGE_STEPS", ""))
    command = [sys.executable, str(script), str(ROOT / "docker/cpu.Dockerfile"), os.environ["IMAGE_ROOT"], *options]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert json.loads(ran.stdout.splitlines()[-1])[-1]["step"].startswith("/app/launch/local.sh")
