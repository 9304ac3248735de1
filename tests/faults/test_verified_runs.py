"""Real runs whose artifacts, source or student were changed, and two processes on one run."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.runtime.hashing import files_of
from tests.injection import available, driver, made_of, student_of
from tests.world import make_world, settings

pytestmark = [pytest.mark.skipif(not available(), reason="no C compiler"), pytest.mark.slow]
SMALL = {
    "data__sequence_length": 16,
    "score__tokens": 128,
    "distill__tokens": 256,
    "evaluate__tokens": 128,
    "evaluate__words": 0,
    "evaluate__speed": "false",
    "report__samples": 0,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Yield a folder with a finished run, a driver, and the settings of a run by the folder it is in."""
    folder = make_world(tmp_path_factory.mktemp("world"))

    def chosen(name, **changed):
        place = {"runs": folder / name / "runs", "artifacts": folder / name / "artifacts"}
        return [*settings(folder, **{**place, **SMALL, **changed}), "run=x"]

    with driver(folder / "driver") as process:
        outcome = process.run(chosen("reference"), folder)
        assert outcome.status == 0, outcome.output[-3000:]
        yield folder, process, chosen


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_flipped_bit_in_any_artifact_is_detected_and_the_artifact_made_again(world):
    folder, process, chosen = world
    place = shutil.copytree(folder / "reference", folder / "flipped", symlinks=True)
    wanted = student_of(folder / "reference/runs/x/student"), made_of(folder / "reference/artifacts")
    number = rounds = 0
    while True:  # the file of this number in every artifact
        flipped = []
        for artifact in sorted((place / "artifacts").glob("[a-z]*")):
            flipped += [path for _, path in files_of(artifact)][number : number + 1]
        if not flipped:
            break
        for path in flipped:
            flip(path)
        outcome = process.run(chosen("flipped"), place)
        assert outcome.status == 0, outcome.output[-3000:]
        assert outcome.output.count("is damaged and not used") == len(flipped)
        assert (student_of(place / "runs/x/student"), made_of(place / "artifacts")) == wanted
        number, rounds = number + 1, rounds + 1
    assert rounds > 5


def test_a_source_that_was_changed_in_place_is_another_teacher(world):
    folder, process, chosen = world
    for name in ("a", "b"):
        shutil.copytree(folder / "model", folder / name)
    first = process.run(chosen("source", model__path=folder / "a", stages="[importance]"), folder)
    assert first.status == 0, first.output[-3000:]
    flip(folder / "a/model.safetensors")
    for name in ("b", "a", "b"):
        again = process.run(chosen("source", model__path=folder / name, stages="[importance]"), folder)
        assert again.status == 0, again.output[-3000:]
        teacher = folder / "source/runs/x/teacher/model.safetensors"
        assert teacher.read_bytes() == (folder / name / "model.safetensors").read_bytes()
    assert len(list(folder.glob("source/artifacts/teacher-*"))) == 2


def test_two_processes_on_one_run_make_everything_once(world):
    folder, process, chosen = world
    with driver(folder / "second") as other, ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda each: each.run(chosen("both"), folder), (process, other)))
    for outcome in outcomes:
        assert outcome.status == 0, outcome.output[-3000:]
    assert student_of(folder / "both/runs/x/student") == student_of(folder / "reference/runs/x/student")
    assert made_of(folder / "both/artifacts") == made_of(folder / "reference/artifacts")
    assert not list(folder.glob("both/artifacts/.damaged/*"))
