"""The Python API: the steps on a model in memory equal the stages, and a call validates as the command line does."""

import pytest
import torch
from transformers import AutoTokenizer

from pipeline import api
from pipeline.model.blueprint import everything
from pipeline.runtime.model_loader import load_model
from tests.tiny import tiny_model, tokens
from tests.world import make_world, settings


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama").eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("api"))


def chosen(world, **changed):
    return dict(word.split("=", 1) for word in settings(world, **changed))


def test_a_plan_that_keeps_everything_returns_the_same_model_bit_for_bit(model):
    student = api.cut(model, everything(api.anatomy(model).sizes))
    for name, tensor in model.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor), name
    assert torch.equal(student(tokens()).logits, model(tokens()).logits)


def test_a_student_cut_in_memory_is_an_ordinary_checkpoint(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blueprint = api.plan(model, api.measure(model, [tokens(4, 16)]), layers=3, neurons=16, hidden=24)
    student = api.cut(model, blueprint)
    assert (student.config.num_hidden_layers, student.config.intermediate_size, student.config.hidden_size) == (
        3,
        16,
        24,
    )
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    student.save_pretrained(tmp_path / "student")
    again = load_model(tmp_path / "student", student.dtype, model.config._attn_implementation)
    assert torch.equal(again(tokens()).logits, student(tokens()).logits)


def test_a_shape_that_cannot_be_cut_is_refused(model):
    scores = api.measure(model, [tokens(2, 8)])
    with pytest.raises(ValueError, match=r"shape\.layers"):
        api.plan(model, scores, layers=9)
    with pytest.raises(ValueError, match="wider"):
        api.plan(model, scores, hidden=1024)


def test_batches_are_the_rows_of_a_text_in_order(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    text = (world / "calibration.txt").read_text()
    batches = list(api.token_batches(tokenizer, text, length=16, size=3, limit=7))
    assert [tuple(batch.shape) for batch in batches] == [(3, 16), (3, 16), (1, 16)]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert torch.cat(batches).flatten().tolist() == ids[: 7 * 16]
    with pytest.raises(ValueError, match="one row of 4096"):
        next(api.token_batches(tokenizer, "short", length=4096))


@pytest.mark.slow
def test_one_call_runs_a_recipe_and_a_second_one_does_no_work(world, capsys):
    run = api.prune(world / "model", run="call", settings=chosen(world, evaluate__speed="false", report__samples=0))
    assert run.student.config.num_hidden_layers == len(run.blueprint.layers) == 3
    assert run.report["parameters"]["student"] == run.student.num_parameters()
    assert (run.folder / "student" / "config.json").is_file()
    capsys.readouterr()
    api.prune(world / "model", run="call", settings=chosen(world, evaluate__speed="false", report__samples=0))
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"distill.batch": 4}, "distill.global_batch_size"),
        ({"distill.tokens": -1}, "distill.tokens"),
        ({"shape.layers": "many"}, "shape.layers"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_as_on_the_command_line(world, wrong, named):
    with pytest.raises(ValueError, match=named):
        api.prune(world / "model", settings=chosen(world) | wrong)


def test_paths_with_any_character_reach_the_configuration_as_they_are(tmp_path):
    folder = make_world(tmp_path / "my model, (1)='x'")
    run = api.prune(
        folder / "model", run="odd", settings=chosen(folder, stages="[importance]") | {"runs": folder / "runs"}
    )
    assert run.folder == folder / "runs" / "odd" and run.artifacts["scores"].is_dir()


def test_a_budget_is_a_fraction_or_settings_of_their_section(world):
    for budget, message in ((1.7, r"^budget\.parameters: 1\.7 "), ({"total": 1.7}, r"^budget\.total: 1\.7 ")):
        with pytest.raises(ValueError, match=message):
            api.prune(world / "model", budget=budget)
    with pytest.raises(ValueError, match=r"'budget\.totel'; did you mean 'budget\.total'"):
        api.prune(world / "model", budget={"totel": 0.7})


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_experts_are_pruned_in_memory(kind, tmp_path):
    model = tiny_model(kind)
    same = api.cut(model, everything(api.anatomy(model).sizes))
    for name, tensor in model.state_dict().items():  # up to the float32 in which some classes keep their router
        assert torch.equal(same.state_dict()[name].float(), tensor.float()), name
    student = api.cut(model, api.plan(model, api.measure(model, [tokens(4, 16)]), experts=3))
    student.set_experts_implementation("eager")
    student.save_pretrained(tmp_path)
    again = load_model(tmp_path, torch.float64, "eager")
    again.set_experts_implementation("eager")
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, student(tokens()).logits)
    assert api.anatomy(again).sizes.carried["e"] == 3
