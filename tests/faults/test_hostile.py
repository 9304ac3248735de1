"""Names in a checkpoint never become code, a class or a path; a tokenizer's code runs only when trusted."""

import json
import shutil

import pytest
import torch

from pipeline import runner
from pipeline.model.export_forms import OWN_CLASS, OWN_FILE
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model
from pipeline.stages.deliver import export
from tests.students import imported, machine, student
from tests.tiny_text import configured
from tests.world import make_world, settings

CODE = 'LlamaForCausalLM"); open("CANARY", "w").write("executed"); ("'


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def hurt(world, tmp_path, monkeypatch):
    """Return a copy of the world's model to be damaged; the working folder is where a canary file would appear."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(world / "model", tmp_path / "hurt")


def edit(folder, file="config.json", **fields):
    kept = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps(kept | fields))


def refusals(world, folder):
    """Return the errors of a folder used as the teacher and as the student, without the setting's name."""
    for field, chosen in (("model.path", []), ("model.start", ["recipe=recover"])):
        with pytest.raises(ValueError) as fault:
            runner.check(configured(*settings(world, run="x"), *chosen, f"{field}={folder}"))
        message = str(fault.value)
        assert message.startswith(f"{field}: {folder}/") and "\n" not in message and ";" in message
        yield message.removeprefix(f"{field}: ")


NAMES = {
    "code": [CODE],
    "a quote": ["Llama'ForCausalLM"],
    "a line break": ["LlamaForCausalLM\nimport os"],
    "a dotted path": ["os.system"],
    "a path": ["../LlamaForCausalLM"],
    "another alphabet": ["L\u0430maForCausalLM"],
    "a number": [7],
    "a list in the list": [["LlamaForCausalLM"]],
    "a second that is code": ["LlamaForCausalLM", CODE],
    "nothing": [],
    "an empty word": [""],
    "a word": "LlamaForCausalLM",
    "an object": {"0": "LlamaForCausalLM"},
}


@pytest.mark.parametrize("case", NAMES)
def test_architectures_that_cannot_name_a_class_are_refused_before_any_work(world, hurt, case):
    edit(hurt, architectures=NAMES[case])
    assert all("config.json: architectures is " in message for message in refusals(world, hurt))


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"model_type": ["llama"]}, "model_type is"),
        ({"model_type": {"a": 1}}, "model_type is"),
        ({"pruned": {"base": CODE}}, "pruned.base is"),
        ({"pruned": {"base": "GPT2LMHeadModel"}}, "pruned.base is"),
        ({"pruned": {"base": ["LlamaForCausalLM"]}}, "pruned.base is"),
        ({"pruned": "LlamaForCausalLM"}, "pruned is"),
    ],
)
def test_other_names_that_would_choose_a_class_are_refused(world, hurt, fields, fault):
    edit(hurt, **fields)
    assert all(f"config.json: {fault} " in message for message in refusals(world, hurt))


@pytest.mark.parametrize("named", [[OWN_CLASS], ["LlamaModel"], ["exec"]])
def test_the_modelling_file_names_a_class_of_the_table_whatever_the_checkpoint_says(tmp_path, named):
    source = student("llama", tmp_path / "s", dtype=torch.float32)
    edit(source.folder, architectures=named)
    chosen = configured("export.form=own", "export.dtype=float32", "export.tolerance=1e-4")
    export.run(chosen, {"initial_student": source.folder}, tmp_path / "out", machine())
    written = (tmp_path / "out" / OWN_FILE).read_text()
    assert written.endswith(f'\n{OWN_CLASS} = pruned_class("LlamaForCausalLM")\n')
    assert open_checkpoint(tmp_path / "out").config["pruned"]["base"] == "LlamaForCausalLM"


def test_fields_of_the_config_that_are_no_widths_are_not_set_by_a_layer_of_its_own(tmp_path):
    source = student("llama", tmp_path / "s", dtype=torch.float32)
    pruned = source.config["pruned"]
    for heads in pruned["attention"].values():
        heads["_attn_implementation"] = "someone/kernel"
    edit(source.folder, pruned=pruned)
    model = load_model(source.folder, torch.float32, "eager")
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"eager"}


@pytest.mark.parametrize("trusted", ["false", "true"])
def test_modelling_code_in_a_folder_of_a_known_family_is_never_run(world, hurt, trusted):
    edit(hurt, auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Mine"})
    (hurt / "mine.py").write_text("open('CANARY', 'w').write('executed')\n")
    chosen = configured(*settings(world, run="x"), f"model.path={hurt}", f"model.trust_remote_code={trusted}")
    runner.check(chosen)
    teacher = imported(hurt, hurt.parent / "teacher", trusted == "true")
    assert any("LlamaForCausalLM" in note for note in teacher.notes)
    assert type(load_model(teacher.folder, torch.float32, "eager")).__name__ == "LlamaForCausalLM"
    assert not (hurt.parent / "CANARY").exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_code_is_copied_for_a_tokenizer_only_and_only_if_trusted(hurt, tmp_path, trusted):
    for file in ("modeling_mine.py", "tokenization_mine.py"):
        (hurt / file).write_text("open('CANARY', 'w').write('executed')\n")
    edit(hurt, auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    edit(hurt, "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_mine.Mine", None]})
    before = {path.name: path.read_bytes() for path in hurt.iterdir()}
    imported(hurt, tmp_path / "start", trusted)
    start = open_checkpoint(tmp_path / "start")
    write_checkpoint(tmp_path / "student", start.config, start.items(), 1e9, start.folder)
    chosen = configured("export.form=auto", "export.dtype=float32", f"model.trust_remote_code={str(trusted).lower()}")
    export.run(chosen, {"initial_student": tmp_path / "student"}, tmp_path / "out", machine())
    for folder in (tmp_path / "start", tmp_path / "student", tmp_path / "out"):
        mapped = ["auto_map" in json.loads((folder / f).read_text()) for f in ("config.json", "tokenizer_config.json")]
        assert mapped == [False, trusted] and any(folder.glob("*.py")) is trusted, folder
    assert before == {path.name: path.read_bytes() for path in hurt.iterdir()}
    assert not (tmp_path / "CANARY").exists()


def sharded(folder, file="shard.safetensors", index="model.safetensors.index.json"):
    """Name a shard, in an index, for all the weights of a folder."""
    names = list(open_checkpoint(folder))
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)}))


SHARDS = ["../shard.safetensors", "{there}", "./shard", "a/b", "..", ".", "", "a\\b", "a\0b", "a\nb", 7, None, []]


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("file", SHARDS)
def test_a_shard_is_a_file_of_the_folder_itself(world, hurt, file, index):
    sharded(hurt, str(hurt / "shard.safetensors") if file == "{there}" else file, index)
    shutil.copy(hurt / "shard.safetensors", hurt.parent)
    if index.startswith("pytorch"):
        (hurt / "shard.safetensors").rename(hurt / "shard.bin")
    assert all(f"{index}: weight_map names " in message for message in refusals(world, hurt))


def test_a_shard_that_is_a_link_into_the_blobs_of_a_hub_cache_is_read(hurt, tmp_path):
    sharded(hurt)
    (tmp_path / "blobs").mkdir()
    (hurt / "shard.safetensors").rename(tmp_path / "blobs" / "0123")
    (hurt / "shard.safetensors").symlink_to("../blobs/0123")
    assert load_model(hurt, torch.float32, "eager").config.hidden_size == 32
    imported(hurt, tmp_path / "teacher")
    assert open_checkpoint(tmp_path / "teacher").anatomy.sizes.hidden == 32


@pytest.mark.parametrize("file", ["weights.bin", "weights.SAFETENSORS", "safetensors"])
def test_an_index_of_safetensors_never_leads_to_a_pickle(world, hurt, file):
    torch.save({"a": torch.ones(1)}, hurt / file)
    sharded(hurt, file)
    assert all(f"model.safetensors.index.json: weight_map names {file}" in message for message in refusals(world, hurt))
    with pytest.raises(ValueError, match=file):
        open_checkpoint(hurt, allow_pickle=True)
