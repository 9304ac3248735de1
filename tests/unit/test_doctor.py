"""The doctor: what it says of a machine, and its exit code."""

import re
import socket

import pytest

from pipeline.runtime import doctor
from pipeline.runtime.device import missing


def said(capsys, *arguments):
    code = doctor.doctor(list(arguments))
    return code, capsys.readouterr().out


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (*doctor.INTERFACE.values(), "WANDB_MODE", "HCCL_IF_BASE_PORT", "HCCL_EVENT_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)


def test_a_cpu_can_run_and_nothing_is_written(capsys, tmp_path):
    code, text = said(capsys, "device=cpu")
    assert code == 0 and text.endswith("device cpu can run\n")
    for name in ("python", "torch", "deepspeed", "chip", "computes", "memory", "artifacts", "W&B"):
        assert re.search(rf"^(ok|warning) +{name} ", text, re.MULTILINE), text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["npu", "cuda"])
def test_a_device_that_cannot_run_fails_with_a_remedy(capsys, kind):
    if missing(kind) is None:
        pytest.skip(f"this machine has {kind}")
    code, text = said(capsys, f"device={kind}")
    assert code == 1 and f"device {kind} cannot run" in text
    assert re.search(rf"^FAILS +{kind} .*\n +-> \w+", text, re.MULTILINE), text


@pytest.mark.parametrize("argument", ["devise=cpu", "device", "device=tpu"])
def test_misuse_is_told_from_a_machine_that_cannot_run(capsys, argument):
    code, text = said(capsys, argument)
    assert code == 2 and text.startswith("error: ")


def test_an_interface_that_does_not_exist_fails(capsys, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    code, text = said(capsys, "device=cpu")
    assert code == 1 and re.search(r"FAILS +GLOO_SOCKET_IFNAME +nosuch0", text)


def test_a_folder_that_cannot_be_made_fails(capsys, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    code, text = said(capsys, "device=cpu", "artifacts=file/artifacts")
    assert code == 1 and re.search(r"FAILS +artifacts ", text)


def test_an_hccl_port_in_use_is_seen(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        base = min(port, 65536 - doctor.HCCL_PORTS)
        monkeypatch.setenv("HCCL_IF_BASE_PORT", str(base))
        row = doctor._ports()
    assert row.state == doctor.WARNING and str(port) in row.value
    monkeypatch.setenv("HCCL_IF_BASE_PORT", "65530")
    assert doctor._ports().state == doctor.FAILS


@pytest.mark.parametrize("wheel, state", [("2.12.0", "ok"), ("2.13.0", "warning")])
def test_a_cann_that_was_not_released_with_its_torch_npu_is_a_warning(tmp_path, wheel, state):
    (tmp_path / "version.cfg").write_text("# version\nruntime_running_version=[9.1.0:9.1.0.B100]\n")
    row = doctor._cann(tmp_path, wheel)
    assert (row.value, row.state) == ("9.1.0", state)
