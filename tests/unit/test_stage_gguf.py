"""Stage gguf, with a stand-in for llama.cpp's converter: what is written is compared, completed and recorded."""

import json
from dataclasses import replace
from pathlib import Path

import gguf as package
import pytest
import torch

from pipeline.model.blueprint import Group, LayerPlan
from pipeline.model.exported import Converted, Exported
from pipeline.runtime.gguf_converter import check_written, convert, converter_digest
from pipeline.runtime.gguf_header import flags, join, read_header
from pipeline.stages.deliver import gguf
from tests.students import machine, student
from tests.tiny import save_tiny, tiny_model
from tests.tiny_text import configured

CONVERTER = Path(__file__).parents[1] / "stand_in_converter.py"
ALIKE = tuple(LayerPlan(i, (Group(i, 0, (0, 1)),), tuple(range(16))) for i in (0, 2, 3))
EXPORTED = Exported("LlamaForCausalLM", 4, 0.0, "stock", False, None, 1)


def chosen(*changed: str):
    return configured("export.gguf=f32", f"export.gguf_converter={CONVERTER}", *changed)


def written(kind, folder, form="stock", **changed):
    """Run the stage on a student of three layers; return its checkpoint and the folder that the stage filled."""
    source = student(kind, folder / "student", ALIKE, dtype=torch.float32, **changed)
    replace(EXPORTED, form=form).save(source.folder)
    (folder / "out").mkdir()
    gguf.run(chosen(), {"student": source.folder}, folder / "out", machine())
    return source, folder / "out"


def test_the_file_holds_the_student_and_its_record_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, out = written("llama", Path("."))
    assert {path.name for path in out.iterdir()} == {"model.gguf", "gguf.json"}
    found = Converted.load(out)
    assert found == Converted("model.gguf", "f32", "llama", {"F32": len(source)}, found.bytes, 1.0, False)
    assert found.bytes == (out / "model.gguf").stat().st_size
    read = {tensor.name: tensor.data for tensor in package.GGUFReader(out / "model.gguf").tensors}
    stored = source["model.layers.2.mlp.down_proj.weight"].numpy()
    assert (read["blk.2.ffn_down.weight"] == stored).all()


def test_windows_and_scale_are_written_for_the_graph(tmp_path):
    windows = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    source, out = written("gemma3_text", tmp_path, layer_types=windows, query_pre_attn_scalar=2)
    found = Converted.load(out)
    assert found.windows and found.query_factor == 2.0
    reader = package.GGUFReader(out / "model.gguf")
    assert reader.fields["gemma3.attention.sliding_window_pattern"].contents() == [True, False, True]
    read = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    gain = source["model.layers.0.self_attn.q_norm.weight"]
    torch.testing.assert_close(read["blk.0.attn_q_norm.weight"], 2 * gain + 1)
    assert torch.equal(read["blk.0.attn_k_norm.weight"], source["model.layers.0.self_attn.k_norm.weight"])


@pytest.mark.parametrize(
    "fault, named",
    [
        ("fails", "converter failed .NotImplementedError: the tokenizer was not recognized"),
        ("loses", "elements in layer 1"),
    ],
)
def test_what_is_not_the_student_is_refused_in_one_line(fault, named, tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN", fault)
    with pytest.raises(ValueError, match=f"^export.gguf: .*{named}") as refusal:
        written("llama", tmp_path)
    assert "\n" not in str(refusal.value)


def test_another_order_of_layers_than_the_students_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN", "windows")
    with pytest.raises(ValueError, match="^export.gguf: .*sliding_window_pattern"):
        written("gemma3_text", tmp_path)


@pytest.mark.parametrize(
    "kind, field, named",
    [("gemma3_text", "query_pre_attn_scalar", None), ("mistral", "sliding_window", "mistral without sliding windows")],
)
def test_what_config_json_leaves_to_the_class_is_the_classes_own(kind, field, named, tmp_path):
    """Gemma 3 assumes a scale of 256, Mistral a window of 4096."""
    source = student(kind, tmp_path / "student", ALIKE, dtype=torch.float32, max_position_embeddings=8192)
    stated = json.loads((source.folder / "config.json").read_text())
    del stated[field]
    (source.folder / "config.json").write_text(json.dumps(stated))
    EXPORTED.save(source.folder)
    (tmp_path / "out").mkdir()
    if named:
        with pytest.raises(ValueError, match=f"^export.gguf: .*{named}"):
            gguf.run(chosen(), {"student": source.folder}, tmp_path / "out", machine())
    else:
        gguf.run(chosen(), {"student": source.folder}, tmp_path / "out", machine())
        assert Converted.load(tmp_path / "out").query_factor == (8 / 256) ** 0.5


@pytest.mark.parametrize("form", ["own", "decilm"])
def test_forms_that_llama_cpp_does_not_read_are_refused_with_the_one_it_does(form, tmp_path):
    with pytest.raises(ValueError, match="^export.gguf: .*export.form=padded$"):
        written("llama", tmp_path, form)


def test_code_in_the_folder_is_not_run(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "tokenization_x.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="^export.gguf: .*tokenization_x.py"):
        written("llama", tmp_path)


def test_widths_and_tensors_outside_the_layers_are_compared(tmp_path):
    source, out = written("llama", tmp_path)
    header = read_header(out / "model.gguf")
    check_written(header, source)
    narrow = replace(header, fields=header.fields | {"llama.feed_forward_length": 15})
    with pytest.raises(ValueError, match="^export.gguf: .*neurons 15, not 16"):
        check_written(narrow, source)
    for name in ("output_norm.weight", "output.weight", "token_embd.weight"):
        lacking = replace(header, tensors=tuple(tensor for tensor in header.tensors if tensor.name != name))
        with pytest.raises(ValueError, match="^export.gguf: "):
            check_written(lacking, source)


def test_refusals_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="^export.gguf_converter: .*nowhere.py is not there"):
        gguf.check(configured("export.gguf=f32", "export.gguf_converter=nowhere.py"))
    gguf.check(configured("export.gguf_converter=nowhere.py"))
    for kind, changed, named in (
        ("cohere", (), "^export.gguf: .*model type cohere"),
        ("gemma3_text", (), "reinit.absorb=false$"),
        ("gemma3_text", ("reinit.absorb=false",), None),
        ("llama", (), None),
    ):
        folder = save_tiny(tiny_model(kind), tmp_path / kind)
        if named is None:
            gguf.check(chosen(f"model.path={folder}", *changed))
            continue
        with pytest.raises(ValueError, match=named):
            gguf.check(chosen(f"model.path={folder}", *changed))


def test_the_converters_code_names_the_file_and_its_place_does_not(tmp_path):
    places = [tmp_path / name for name in "abc"]
    for place in places:
        (place / "conversion").mkdir(parents=True)
        (place / "convert.py").write_text("import conversion")
        (place / "conversion" / "base.py").write_text("one = 1")
    (places[2] / "conversion" / "base.py").write_text("one = 2")
    same, other, changed = (converter_digest(place / "convert.py") for place in places)
    assert same == other != changed


def test_long_conversions_print_their_progress(tmp_path):
    script, said = tmp_path / "slow.py", []
    script.write_text("import sys, time\nopen(sys.argv[3], 'wb').write(b'x' * 2000000)\ntime.sleep(0.4)")
    convert(script, tmp_path, "f32", tmp_path / "model.gguf", 4e6, said.append, every=0.05)
    assert said and said[-1] == "gguf: 2.0 MB of about 4.0 MB written"


def test_a_field_is_added_and_all_else_stays(tmp_path):
    source = save_tiny(tiny_model("llama", dtype=torch.float32), tmp_path / "model")
    (tmp_path / "plain").mkdir()
    convert(CONVERTER, source, "f32", tmp_path / "plain" / "m.gguf", 1.0, print)
    header = read_header(tmp_path / "plain" / "m.gguf")
    join([header], tmp_path / "more.gguf", [flags("some.flags", [True, False, True])])
    before, after = (package.GGUFReader(path) for path in (header.path, tmp_path / "more.gguf"))
    assert after.fields.pop("some.flags").contents() == [True, False, True]
    shown = [{name: field.contents() for name, field in reader.fields.items()} for reader in (before, after)]
    assert {name: value for name, value in shown[0].items() if not name.startswith("GGUF")} == {
        name: value for name, value in shown[1].items() if not name.startswith("GGUF")
    }
    for one, other in zip(before.tensors, after.tensors, strict=True):
        assert one.name == other.name and (one.data == other.data).all()
