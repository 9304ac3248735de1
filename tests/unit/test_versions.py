"""Every version that docs, docker and pyproject.toml name is that of pipeline/runtime/versions.py."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipeline.runtime import versions
from pipeline.runtime.versions import RELEASES, TORCH, TORCH_NPU, torch_of

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = ROOT / "requirements/lock.txt"
WHEELS = {wheel for release in RELEASES for wheel in release.torch_npu}
KNOWN = {  # what a page may name of each package
    "torch": {*TORCH.values(), *map(torch_of, WHEELS)},
    "torch_npu": {*WHEELS, versions.SCHEMAS},
    "CANN": {release.cann for release in RELEASES} | {versions.CANN, "9.1.x"},
    "triton-ascend": set(versions.TRITON_ASCEND.values()),
    "vllm-ascend": {versions.SERVING["vllm-ascend"]},
}


def requirements(names: list[str]) -> dict[str, Requirement]:
    return {parsed.name: parsed for parsed in map(Requirement, names)}


def text_of(file: str) -> str:
    return (ROOT / file).read_text()


def test_the_default_set_is_a_released_one():
    assert TORCH_NPU in WHEELS and torch_of(TORCH_NPU) == TORCH["npu"]
    assert any(TORCH_NPU in release.torch_npu and release.fits(versions.CANN) for release in RELEASES)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", versions.AS_OF)


def test_pyproject_admits_what_is_installed():
    torch = requirements(PROJECT["dependencies"])["torch"].specifier
    assert all(torch.contains(version) for version in TORCH.values())
    npu = requirements(PROJECT["optional-dependencies"]["npu"])["torch_npu"].specifier
    newer = {wheel for wheel in WHEELS if torch.contains(torch_of(wheel))}
    assert {wheel for wheel in WHEELS if npu.contains(wheel, prereleases=True)} == newer
    assert not npu.contains(versions.SCHEMAS)  # no released set has it
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(versions.PYTHON)


@pytest.mark.parametrize("kind", ["cpu", "cuda", "npu"])
def test_images_install_these_versions(kind):
    text = text_of(f"docker/{kind}.Dockerfile")
    assert re.findall(r"torch==([\w.]+)", text) == [TORCH[kind]]
    assert re.findall(r"torch_npu==([\w.]+)", text) == ([TORCH_NPU] if kind == "npu" else [])
    assert f"TORCH_INDEX={versions.CUDA_INDEX if kind == 'cuda' else versions.CPU_INDEX}\n" in text
    if kind == "npu":
        assert set(re.findall(r"quay\.io/ascend/cann:[\w.-]+", text)) == set(versions.CANN_IMAGES)
    else:
        assert f"FROM python:{versions.PYTHON_IMAGE}\n" in text


def test_make_setup_installs_the_tested_torch():
    assert f"torch=={TORCH['cpu']}\n" in text_of("Makefile")


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_pages_name_no_other_versions(file):
    text = text_of(f"docs/{file}")
    for package, known in KNOWN.items():
        named = re.findall(rf"(?<![\w-]){re.escape(package)}(?:==| )v?(\d+\.\d+(?:\.\w+)*)", text)
        for version in named:
            assert version in known or any(each.startswith(f"{version}.") for each in known), (package, version)


def test_the_page_on_ascend_has_the_table_and_the_lines_to_install():
    text = text_of("docs/ascend.md")
    assert versions.AS_OF in text
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.x]+) \| ([\w., ]+) \|$", text, re.MULTILINE)
    canns = [release.cann if release.cann.count(".") == 2 else f"{release.cann}.x" for release in RELEASES]
    assert rows == [(each.name, cann, ", ".join(each.torch_npu)) for each, cann in zip(RELEASES, canns)]
    for part in (
        f"torch=={TORCH['npu']}",
        versions.CPU_INDEX,
        f"--extra-index-url {versions.ASCEND_INDEX} torch_npu=={TORCH_NPU}",
        f"--no-deps --index-url {versions.ASCEND_INDEX} triton-ascend=={versions.TRITON_ASCEND['9.1']}",
        f"vllm-ascend {versions.SERVING['vllm-ascend']}",
        f"transformers {versions.SERVING['transformers']}",
    ):
        assert part in text, part


def test_the_lock_has_every_dependency_in_a_version_that_pyproject_admits():
    lines = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    locked = dict(line.split("==") for line in lines)
    assert list(locked) == sorted(locked) and locked["torch"] == TORCH["cpu"]
    named = requirements([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
    for name, requirement in named.items():
        version = locked.get(name.lower().replace("_", "-"))
        assert version is not None, f"{name}: make the lock again with requirements/lock.py"
        assert requirement.specifier.contains(version, prereleases=True), name
