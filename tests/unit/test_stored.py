"""Values and ledgers of artifacts: what was saved is loaded, and anything else is refused in one line."""

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest

from pipeline.allocate.curves import Narrowing, Sensitivities
from pipeline.allocate.widths import Sparsities
from pipeline.costmodel.pareto import Serving
from pipeline.costmodel.search_result import Row, SearchResult
from pipeline.distill.layer_errors import LayerError, LayerErrors
from pipeline.distill.selection import RecoveryFacts
from pipeline.evaluation.results import Behaviour, Evaluation, ReferenceEvaluation
from pipeline.model.blueprint import Blueprint, Group, LayerPlan, Step
from pipeline.model.exported import Converted, Exported
from pipeline.model.shape import (
    Budgeted,
    Depth,
    Reachable,
    Removal,
    Shape,
    StreamEnergy,
    Sublayers,
    Trial,
    Widths,
)
from pipeline.model.sizes import LayerSizes
from pipeline.model.stored import Stored
from pipeline.model.token_ids import Vocabulary
from pipeline.runtime.ledger import Ledger

LAYER = LayerPlan(0, (Group(0, 0, (0, 1)),), (1, 2))
SHAPE = Shape(2, 32, 4, 2, 24)
ROW = Row(SHAPE, 0.5, 1.0, 2.0, 3.0, 4.0, True)
VALUES = [
    SHAPE,
    Shape(2, 32, 4, 2, 24, weights=1000),
    Depth((0, 2), 1.5, (Trial((0, 2), 1.5), Trial((0, 1), math.inf))),
    Depth((0, 1), None, ()),
    Widths((LayerSizes(4, 2, 24), LayerSizes(2, 1, 16))),
    Budgeted("total", 0.7, 0.69, Reachable(0.69, {"layers": 2}), None, 64),
    Vocabulary((0, 2), 3, 3, 2, 0.5),
    StreamEnergy((1.5, 0.5), False),
    Sparsities((0.25, 0.5)),
    Sensitivities((Narrowing(None, None, 0, 0.0), Narrowing(1, "neurons", 8, 0.5))),
    LayerErrors((LayerError(0, 0.5, 0.25),)),
    Exported("LlamaForCausalLM", 4, 0.0, "stock", False, None, 1024),
    Converted("model.gguf", "f16", "llama", {"F16": 3, "F32": 2}, 2048, 1.0, False),
    Sublayers((0, 1, 3), (Removal(1, "attention_layers", 0.25), Removal(0, "ffn_layers", 0.5))),
    RecoveryFacts("held_out_kl", 1.0, 0.5, 8, 0.25, 4, False, True, True),
    Blueprint((0, 1), (LAYER,)),
    Step((0, 1), (LAYER,)),
    SearchResult("CPU", Serving(1, 2, 3, "bf16", 1, "decode"), "rule", 10, 5, ROW, (ROW,), SHAPE),
    ReferenceEvaluation({"text": {"tokens": 8}}, {"text": {"loss": 1.0}}, Behaviour(8, {}, ("more",))),
    Evaluation({"kind": "cpu"}, {"student": {}}, {"text": {}}, {"student": {}}, None, ({"text": "a"},)),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_is_loaded_as_it_was_saved(value, tmp_path):
    value.save(tmp_path)
    assert type(value).load(tmp_path) == value


def test_every_stored_value_is_tested():
    def kinds(kind):
        return {kind, *(each for child in kind.__subclasses__() for each in kinds(child))}

    stored = {kind for kind in kinds(Stored) if "FILE" in vars(kind) and kind.__module__.startswith("pipeline.")}
    assert stored == set(map(type, VALUES))
    assert len({kind.FILE for kind in stored}) == len(stored)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("damage", ["cut", "unknown", "missing", "list"])
def test_malformed_content_is_refused_in_one_line_that_names_the_file(value, damage, tmp_path):
    value.save(tmp_path)
    path = tmp_path / value.FILE
    text = path.read_text()
    fields = json.loads(text)
    if damage == "cut":
        path.write_text(text[: len(text) // 2])
    elif damage == "unknown":
        path.write_text(json.dumps(fields | {"other": 1}))
    elif damage == "missing":
        fields.pop(next(iter(fields)))
        path.write_text(json.dumps(fields))
    else:
        path.write_text("[1]")
    with pytest.raises(ValueError, match="is damaged") as error:
        type(value).load(tmp_path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message


def test_a_value_of_another_type_is_refused(tmp_path):
    @dataclass(frozen=True)
    class Counted(Stored):
        FILE: ClassVar[str] = "counted.json"
        count: int

    (tmp_path / "counted.json").write_text('{"count": "3"}')
    with pytest.raises(ValueError, match="count"):
        Counted.load(tmp_path)


def test_a_ledger_keeps_entries_and_drops_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "ledger.jsonl"
    trials = [Trial((0, 1), 1.5), Trial((0, 2), math.inf), Trial((1, 2), 0.5)]
    ledger = Ledger(path, Trial)
    for trial in trials[:2]:
        ledger.append(trial)
    with path.open("a") as file:
        file.write('{"kept": [1, 2], "lo')
    again = Ledger(path, Trial)
    assert again.entries == trials[:2]
    again.append(trials[2])
    assert Ledger(path, Trial).entries == trials == again.entries
    again.discard()
    assert not path.exists() and Ledger(path, Trial).entries == []


@pytest.mark.parametrize("line", ["{", "[1]", '{"kept": [0], "loss": 1.0}', ""])
def test_from_a_line_that_is_no_entry_on_a_ledger_is_dropped(line, tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path, Trial).append(Trial((0,), 1.0))
    sound = path.read_text()
    path.write_text(f"{sound}{line}\n{sound}")
    assert Ledger(path, Trial).entries == [Trial((0,), 1.0)]
    assert path.read_text() == sound


def test_an_entry_of_numbers_and_tuples_survives(tmp_path):
    ledger = Ledger(tmp_path / "pairs.jsonl", tuple[int, float])
    ledger.append((1, math.nan))
    (entry,) = Ledger(tmp_path / "pairs.jsonl", tuple[int, float]).entries
    assert entry[0] == 1 and math.isnan(entry[1])
