"""The doctor: its report of a machine, and its exit code."""

import re
import socket

import pytest

from pipeline.runtime import doctor, doctor_npu
from pipeline.runtime.device import missing
from pipeline.runtime.versions import ASCEND_INDEX, CPU_INDEX, RELEASES


def report(capsys, *arguments):
    code = doctor.doctor(list(arguments))
    return code, capsys.readouterr().out


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (*doctor.INTERFACE.values(), "WANDB_MODE", "HCCL_IF_BASE_PORT", "HCCL_EVENT_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)


def test_a_cpu_can_run_and_nothing_is_written(capsys, tmp_path):
    code, text = report(capsys, "device=cpu")
    assert code == 0 and text.endswith("device cpu can run\n")
    for name in ("python", "torch", "deepspeed", "chip", "computes", "memory", "artifacts", "W&B"):
        assert re.search(rf"^(ok|warning|-) +{name} ", text, re.MULTILINE), text
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there_and_not_requested_is_neither_ok_nor_a_warning(capsys):
    absent = {kind: fault.split(";")[0] for kind in ("npu", "cuda") if (fault := missing(kind)) is not None}
    code, text = report(capsys)
    assert code == 0
    for kind, reason in absent.items():
        assert re.search(rf"^- +{kind} +not available: {re.escape(reason)}$", text, re.MULTILINE), text


@pytest.mark.parametrize(
    ("name", "version", "state"),
    [
        ("torch", "2.9.0", doctor.OK),
        ("torch", "2.13.0+cpu", doctor.OK),
        ("torch", "2.13.1.dev20261101", doctor.OK),
        ("torch", "2.8.0", doctor.WARNING),
        ("torch", "2.14.0", doctor.WARNING),
        ("torch", None, doctor.FAILS),
        ("transformers", "5.14.0", doctor.OK),
        ("transformers", "5.13.2", doctor.WARNING),
        ("transformers", "6.0.0", doctor.WARNING),
        ("deepspeed", "0.19.8", doctor.OK),
        ("deepspeed", "0.20.0", doctor.WARNING),
        ("hydra-core", "1.3.2", doctor.OK),
        ("hydra-core", "1.4.0", doctor.WARNING),
        ("wandb", None, doctor.FAILS),
    ],
)
def test_versions_are_judged_by_the_ranges_of_the_project(name, version, state):
    sound = {"torch": "2.13.0", "transformers": "5.24.0", "deepspeed": "0.19.8", "hydra-core": "1.3.8"}
    present = dict.fromkeys(doctor.NEEDED, "99.0") | sound | {name: version}
    rows = {row.name: row for row in doctor.software(present)}
    assert rows.pop(name).state == state
    assert all(row.state == doctor.OK for row in rows.values())


@pytest.mark.parametrize("kind", ["npu", "cuda"])
def test_a_device_that_cannot_run_fails_with_a_remedy(capsys, kind):
    if missing(kind) is None:
        pytest.skip(f"this machine has {kind}")
    code, text = report(capsys, f"device={kind}")
    assert code == 1 and f"device {kind} cannot run" in text
    assert re.search(rf"^FAILS +{kind} .*\n +-> \w+", text, re.MULTILINE), text


@pytest.mark.parametrize("argument", ["devise=cpu", "device", "device=tpu"])
def test_misuse_has_an_exit_code_of_its_own(capsys, argument):
    code, text = report(capsys, argument)
    assert code == 2 and text.startswith("error: ")


def test_an_interface_that_does_not_exist_fails(capsys, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    code, text = report(capsys, "device=cpu")
    assert code == 1 and re.search(r"FAILS +GLOO_SOCKET_IFNAME +nosuch0", text)


def test_a_folder_that_cannot_be_made_fails(capsys, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    code, text = report(capsys, "device=cpu", "artifacts=file/artifacts")
    assert code == 1 and re.search(r"FAILS +artifacts ", text)


def test_an_hccl_port_in_use_is_seen(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        base = min(port, 65536 - doctor_npu.HCCL_PORTS)
        monkeypatch.setenv("HCCL_IF_BASE_PORT", str(base))
        row = doctor_npu.ports()
    assert row.state == doctor.WARNING and str(port) in row.value
    monkeypatch.setenv("HCCL_IF_BASE_PORT", "65530")
    assert doctor_npu.ports().state == doctor.FAILS


@pytest.mark.parametrize(
    ("file", "text", "version"),
    [
        ("version.cfg", "# version\nruntime_running_version=[9.1.0:9.1.0.B100]\n", "9.1.0"),
        ("version.info", "Version=8.5.0.B120\n", "8.5.0.B120"),
        ("x86_64-linux/ascend_toolkit_install.info", "package_name=x\nversion=9.0.0\n", "9.0.0"),
        ("version.cfg", "nothing of use\n", None),
        ("other", "version=9.1.0\n", None),
    ],
)
def test_the_version_of_cann_is_read_from_its_files(tmp_path, file, text, version):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert doctor_npu.cann_version(tmp_path) == version


@pytest.mark.parametrize(
    ("pytorch", "cuda", "torch_npu", "cann", "wrong", "install"),
    [
        ("2.12.0+cpu", None, "2.12.0", "9.1.0", [], None),
        ("2.12.0", None, "2.12.0.post2", "9.1.1", [], None),
        ("2.9.0+cpu", None, "2.9.0", "8.5.0", [], None),
        ("2.12.0+cpu", None, "2.12.0", None, [], None),
        ("2.13.0+cpu", None, "2.13.0", "9.1.0", ["torch_npu"], "2.12.0"),
        ("2.13.0+cpu", None, "2.12.0", "9.1.0", ["torch_npu"], "2.12.0"),
        ("2.12.0+cpu", None, None, "9.1.0", ["torch_npu"], "2.12.0"),
        ("2.12.0+cpu", None, "2.12.0", "9.0.0", ["torch_npu"], "2.10.0"),
        ("2.10.0+cpu", None, "2.10.0", "9.1.0", ["torch_npu"], "2.12.0"),
        ("2.12.0+cpu", None, "2.12.0", "7.0.0", ["torch_npu"], "2.12.0"),
        ("2.12.0+cu128", "12.8", "2.12.0", "9.1.0", ["torch"], "2.12.0"),
    ],
)
def test_torch_torch_npu_and_cann_are_a_released_set_or_what_to_install_is_said(
    pytorch, cuda, torch_npu, cann, wrong, install
):
    rows = list(doctor_npu.software_set(pytorch, cuda, torch_npu, cann))
    assert [row.name for row in rows if row.state == doctor.WARNING] == wrong
    for row in rows:
        if row.state == doctor.WARNING:
            base = install.partition(".post")[0]
            assert f"--index-url {CPU_INDEX} torch=={base}" in row.remedy
            assert f"--extra-index-url {ASCEND_INDEX} torch_npu=={install}" in row.remedy


def test_every_released_set_passes_and_no_other_wheel_with_it():
    wheels = {wheel for release in RELEASES for wheel in release.torch_npu}
    for release in RELEASES:
        cann = release.cann if release.cann.count(".") == 2 else f"{release.cann}.2"
        fitting = {wheel for each in RELEASES if each.fits(cann) for wheel in each.torch_npu}
        for wheel in wheels:
            rows = doctor_npu.software_set(wheel.partition(".post")[0], None, wheel, cann)
            assert all(row.state == doctor.OK for row in rows) == (wheel in fitting)


@pytest.mark.parametrize(
    ("triton", "triton_ascend", "cann", "wanted"),
    [
        (None, None, "9.1.0", None),
        (None, "3.2.2", "9.1.0", None),
        (None, "3.2.0", "8.5.0", None),
        (None, "3.2.0", None, None),
        (None, "3.2.0", "9.1.0", "triton-ascend==3.2.2"),
        ("3.9.0", None, "9.1.0", "triton-ascend==3.2.2"),
        ("3.9.0", "3.2.2", "9.1.0", "triton-ascend==3.2.2"),
        ("3.9.0", None, None, "uninstall -y triton"),
    ],
)
def test_the_triton_of_another_device_or_another_cann_is_a_warning(triton, triton_ascend, cann, wanted):
    rows = list(doctor_npu.triton_rows(triton, triton_ascend, cann))
    assert [row.state for row in rows if row.state != doctor.OK] == ([doctor.WARNING] if wanted else [])
    assert all(wanted in row.remedy for row in rows if wanted)
