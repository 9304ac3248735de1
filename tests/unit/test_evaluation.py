import json
import math
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from statistics import median

import pytest
import torch

from pipeline.evaluation import tasks
from pipeline.evaluation.perplexity import finite, over, quality, tallies, tally
from pipeline.evaluation.samples import cache_bytes_per_token, continuation, continue_greedily, opening
from pipeline.evaluation.speed import speeds
from pipeline.evaluation.tasks import Tasks
from pipeline.evaluation.words import Question, questions, right
from tests.questions import own_task, stand_in
from tests.tiny import save_tiny, tiny_model, tokens
from tests.tiny_text import configured
from tests.tiny_tokenizers import tokenizer_folder

TEXT = "The old house stood on a hill. Nobody had lived there for years, and the wind went through its rooms. " * 12


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma2", "gemma3_text", "glm4", "olmo2", "phi3"])
def test_the_tally_in_chunks_is_the_models_own_cross_entropy(kind):
    model, ids = tiny_model(kind), tokens(3, 11)
    logits = model(ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    hits = (logits.argmax(-1) == ids[:, 1:]).sum()
    for chunk in (1, 7, 1000):
        total = tally(model, [ids], chunk)
        torch.testing.assert_close(total, torch.tensor([loss.item(), hits.item(), 30.0], dtype=torch.float64))


def test_tallies_of_two_ranks_add_up_to_the_tally_of_one():
    model, ids = tiny_model("llama"), tokens(4, 10)
    halves = tally(model, [ids[0::2]], 64) + tally(model, [ids[1::2]], 64)
    torch.testing.assert_close(halves, tally(model, ids.split(3), 64))


def test_tallies_are_those_of_each_sequence_by_itself():
    model, ids = tiny_model("llama"), tokens(5, 10)
    found = torch.cat(list(tallies(model, ids.split(2), 4)))
    torch.testing.assert_close(found, torch.stack([tally(model, [row[None]], 64) for row in ids]))


def test_a_perplexity_over_another_has_the_error_of_paired_differences():
    """What both models find hard is no error: only by how much the differences of sequences differ counts."""
    hard = [1.0, 5.0, 2.0, 9.0]
    same = over([each + math.log(1.5) for each in hard], hard)
    assert same.times == pytest.approx(1.5, rel=1e-12) and same.error == pytest.approx(0.0, abs=1e-12)
    found = over([each + extra for each, extra in zip(hard, (0.1, 0.3, 0.1, 0.3), strict=True)], hard)
    deviation = math.sqrt(4 * 0.1**2 / 3)
    assert found.times == pytest.approx(math.exp(0.2), rel=1e-12)
    assert found.error == pytest.approx(math.exp(0.2) * deviation / 2, rel=1e-9)
    assert over([1.0], [0.5]) is None


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity():
    model, ids = tiny_model("llama"), tokens(2, 9)
    torch.nn.init.zeros_(model.lm_head.weight)
    found = quality(tally(model, [ids], 5), text_bytes=32)
    assert found.perplexity == pytest.approx(96, rel=1e-12)
    assert found.bits_per_byte == pytest.approx(16 * math.log2(96) / 32, rel=1e-12)


@pytest.mark.parametrize("nats", [710.0, 800.0, math.inf, math.nan])
def test_a_perplexity_beyond_all_numbers_is_infinite_and_null_in_json(nats):
    found = quality(torch.tensor([nats * 4, 0.0, 4.0], dtype=torch.float64), 10)
    compared = over([nats, nats + 1.0], [0.0, 0.5])
    assert found.perplexity == compared.times == compared.error == math.inf
    result = json.dumps(finite({"q": asdict(found), "losses": [nats, 2.0]}), allow_nan=False)
    assert json.loads(result)["q"]["perplexity"] is None and json.loads(result)["losses"][1] == 2.0
    assert over([2.0, 3.0], json.loads(result)["losses"]).times >= 0.0 and over([700.0, 700.0], [0.0, 0.0]).error == 0.0


def test_a_text_without_a_predicted_token_is_refused():
    with pytest.raises(ValueError, match="data.evaluation"):
        quality(torch.zeros(3, dtype=torch.float64), 10)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "glm4"])
def test_a_continuation_with_a_cache_is_the_repeated_first_choice_without_one(kind):
    model, ids = tiny_model(kind), tokens(1, 6)
    found = [int(token) for token in islice(continuation(model, ids), 12)]
    for token in found:
        assert token == model(ids).logits[0, -1].argmax().item()
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_a_continuation_ends_before_a_stop_token():
    model, ids = tiny_model("llama"), tokens(1, 6)
    free = continue_greedily(model, ids, 8, frozenset())
    stopped = continue_greedily(model, ids, 8, frozenset({free[3]}))
    assert stopped == free[: free.index(free[3])]


def test_a_prompt_that_leaves_too_few_positions_loses_its_beginning():
    model, ids = tiny_model("gpt2"), tokens(1, 64)
    assert model.config.n_positions == 64
    assert continue_greedily(model, ids, 20, frozenset()) == continue_greedily(model, ids[:, -44:], 20, frozenset())
    assert len(continue_greedily(model, ids, 64, frozenset())) == 64


PER_LAYER = 2 * 2 * 8 * 2  # K and V, groups, head size, bytes of bfloat16


def test_a_token_costs_keys_and_values_of_every_group_of_every_layer():
    model = tiny_model("llama", dtype=torch.float32)
    assert cache_bytes_per_token(model, tokens(1, 7), torch.bfloat16) == 4 * PER_LAYER
    assert cache_bytes_per_token(model, tokens(1, 7), torch.float32) == 2 * 4 * PER_LAYER


def test_layers_without_attention_cache_no_keys_and_values():
    model = tiny_model("nemotron_h", dtype=torch.float32)
    assert cache_bytes_per_token(model, tokens(1, 7), torch.bfloat16) == 1 * PER_LAYER


def test_an_opening_starts_a_sentence_and_ends_between_words():
    prompt, follows = opening("of the former. Then a new one begins, and it runs on and on and on.", 21)
    assert (prompt, follows) == ("Then a new one", " begins, and it runs")


def test_models_are_timed_in_turn_and_the_medians_are_of_their_runs():
    models = {"teacher": tiny_model("llama"), "student": tiny_model("llama", num_hidden_layers=2)}
    order: list[str] = []
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    found = speeds(models, tokens(1, 16), 4, 3, torch.device("cpu"), lambda: None)
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["teacher", "student"] * 3
    for speed in found.values():
        assert len(speed.prefill_runs) == len(speed.decode_runs) == 3
        assert (speed.prefill, speed.decode) == (median(speed.prefill_runs), median(speed.decode_runs))
        assert min(*speed.prefill_runs, *speed.decode_runs) > 0


def test_a_word_is_right_exactly_when_it_is_the_models_greedy_continuation():
    model = tiny_model("llama")
    requested = []
    for seed, length in enumerate((5, 9, 6, 11, 7)):
        context = tokens(1, length, seed=seed)
        word = continue_greedily(model, context, 1 + seed % 3, frozenset())
        requested.append(Question(tuple(context[0].tolist()), tuple(word)))
    assert right(model, requested, batch=2).tolist() == [5, 5]
    spoilt = [Question(q.context, (*q.word[:-1], (q.word[-1] + 1) % 96)) for q in requested[:2]]
    assert right(model, spoilt + requested[2:], batch=5).tolist() == [3, 5]
    assert right(model, [], batch=5).tolist() == [0, 0]


def test_questions_are_the_last_words_of_sentences_and_what_stands_before_them(tmp_path):
    from pipeline.runtime.model_loader import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder(tmp_path, TEXT, 200))

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    requested = questions([TEXT], encode, limit=8, context=60)
    assert len(requested) == 8
    for question in requested:
        word = tokenizer.decode(question.word)
        context = tokenizer.decode(question.context)
        assert word in (" hill", " rooms")
        assert len(context) <= 60
        assert context + word + "." in TEXT
    assert questions([TEXT], encode, limit=0, context=60) == []
    assert questions(["No sentence ends here"], encode, limit=8, context=4) == []


@pytest.mark.parametrize("limit", [1, 3, 7, 100, 199, 300])
def test_questions_are_spread_evenly_over_the_sentences(limit):
    texts = [f"Enough stands before it, and {chr(0x100 + place)} now ends. " for place in range(199)]
    requested = questions(texts, lambda text: [ord(letter) for letter in text], limit, 20)
    places = [next(id_ for id_ in each.context if id_ >= 0x100) - 0x100 for each in requested]
    count = min(limit, 199)
    assert places == [place * 199 // count for place in range(count)]


def test_tasks_without_the_harness_are_refused_with_the_remedy():
    if tasks.installed():
        pytest.skip("lm_eval is installed here")
    with pytest.raises(ValueError, match=r"evaluate.tasks.*pip install '.\[eval\]'"):
        tasks.check(Tasks(["arc_easy"]))
    tasks.check(Tasks([]))


def test_a_task_that_the_harness_does_not_know_is_refused_before_any_work_with_those_like_it():
    known = ("arc_challenge", "arc_easy", "hellaswag")
    tasks.check_names(["arc_easy", "hellaswag"], known)
    with pytest.raises(ValueError, match=r"evaluate.tasks.*\['arc_esy'\].*arc_easy"):
        tasks.check_names(["hellaswag", "arc_esy"], known)
    with pytest.raises(ValueError, match=r"evaluate.tasks.*\['zzz'\].*`lm_eval ls tasks`"):
        tasks.check_names(["zzz"], known)


def test_a_preset_is_a_list_of_tasks_and_chats_are_asked_in_the_template():
    quick, chat = (configured(f"evaluate.tasks={name}").evaluate for name in ("quick", "chat"))
    assert quick.task_names == quick.presets["quick"] and not quick.templated and chat.templated
    assert configured("evaluate.tasks=[arc_easy]").evaluate.task_names == ["arc_easy"]
    assert configured("evaluate.tasks=quick", "evaluate.apply_chat_template=true").evaluate.templated
    own = configured("evaluate.tasks=mine", "+evaluate.presets.mine=[own.yaml]").evaluate
    assert own.task_names == ["own.yaml"]
    with pytest.raises(ValueError, match=r"evaluate: tasks is 'arc_easy', .*quick, standard, chat.*\[arc_easy\]"):
        configured("evaluate.tasks=arc_easy")


def test_a_local_task_file_is_measured_by_the_harness(tmp_path):
    pytest.importorskip("lm_eval")
    from pipeline.runtime.model_loader import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder(tmp_path / "model", TEXT))
    model = tiny_model("llama", dtype=torch.float32, max_position_embeddings=256)
    task = own_task(tmp_path, model, tokenizer)
    wanted = Tasks([str(task)], batch_size=2)
    tasks.check(wanted)
    found = tasks.measure(wanted, model, tokenizer, tmp_path)
    assert found["own"]["acc"] == 0.75
    assert found["own"]["questions"] == 4


def test_a_task_file_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="absent.yaml does not exist; correct the path"):
        tasks.check(Tasks([str(tmp_path / "absent.yaml")]))


def in_vllm(python, names=("arc_easy",), **changes):
    return Tasks(list(names), templated=True, backend="vllm", python=python, **changes)


def test_vllm_measures_the_folder_of_a_model_by_a_python_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    model = tiny_model("llama", dtype=torch.float32)
    folder = save_tiny(model, tmp_path / "model")
    wanted = in_vllm(stand_in(tmp_path), arguments={"max_model_len": 64})
    tasks.check(wanted)
    tasks.check_form(wanted, folder)
    assert tasks.measure(wanted, model, None, folder) == {"arc_easy": {"acc": 0.5}}
    request, isolated, sees_rank = json.loads((tmp_path / "request.json").read_text())
    assert (isolated, sees_rank) == ("-I", False)
    assert request == {
        "model": str(folder), "dtype": "float32", "tasks": ["arc_easy"], "templated": True,
        "arguments": {"trust_remote_code": False, "max_model_len": 64},
    }  # fmt: skip


def test_tasks_that_vllm_cannot_measure_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"evaluate.vllm_python: .*absent cannot be run"):
        tasks.check(in_vllm(str(tmp_path / "absent")))
    with pytest.raises(ValueError, match=r"evaluate.vllm_python: .*has no lm_eval and no vllm; install"):
        tasks.check(in_vllm(stand_in(tmp_path, missing=["lm_eval", "vllm"])))
    (tmp_path / "other").mkdir()
    python = stand_in(tmp_path / "other", fails=True)
    with pytest.raises(ValueError, match=r"\['arc_esy'\]; did you mean arc_easy"):
        tasks.check(in_vllm(python, ["arc_esy"]))
    folder = save_tiny(tiny_model("llama", dtype=torch.float32), tmp_path / "model")
    with pytest.raises(ValueError, match=r"evaluate.task_backend: .*no memory left; its output is in (\S+)") as failed:
        tasks.measure(in_vllm(python), tiny_model("llama"), None, folder)
    log = Path(str(failed.value).rpartition(" ")[2])
    assert log.read_text().startswith("first line")
    log.unlink()


def test_a_student_in_its_own_form_is_refused_for_vllm_before_it_is_measured(tmp_path):
    (tmp_path / "config.json").write_text('{"pruned": {}, "auto_map": {}}')
    with pytest.raises(ValueError, match="export.form=decilm or padded"):
        tasks.check_form(in_vllm("python"), tmp_path)
    tasks.check_form(Tasks(["arc_easy"]), tmp_path)
    tasks.check_form(in_vllm("python", ()), tmp_path)
