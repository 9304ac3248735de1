"""Passes that begin in the middle: the numbers of whole ones, and fewer layers run."""

from collections import Counter

import pytest
import torch

from pipeline.evaluation.divergence import final_states
from pipeline.model.causal import decoder_of
from pipeline.prune.importance.measure import only_layers
from pipeline.prune.passes.prefix import PrefixCache
from tests.cut_models import anatomy
from tests.tiny import tiny_model, tokens
from tests.watching import counted

STOPS = {"gemma4_text": [1], "glm_moe_dsa": [3]}


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "olmo2", "phi3", "gemma4_text", "glm_moe_dsa"])
@pytest.mark.parametrize("left_out", [[], [0, -2]])
def test_a_pass_that_begins_behind_some_layers_gives_the_numbers_of_a_whole_one(kind, left_out):
    model = tiny_model(kind)
    of = anatomy(model)
    total = len(of.sizes.layers)
    gone = {layer % total for layer in left_out} - of.required_layers.keys()
    kept = [layer for layer in range(total) if layer not in gone]
    batches = [tokens(), tokens(seed=1)]
    with only_layers(model, total, kept):
        wanted = [final_states(model, ids) for ids in batches]
    prefix, count = PrefixCache(model, of, batches), Counter()
    counted(model, count)
    for ahead in range(len(kept)):
        prefix.reach(kept[:ahead])
        before = Counter(count)
        for number, ids in enumerate(batches):
            with prefix.rest(number, kept):
                assert torch.equal(final_states(model, ids), wanted[number])
        free = [0, *STOPS.get(kind, range(1, total + 1))]  # the layers that a pass can begin with
        passed = max(place for place in range(ahead + 1) if not place or kept[place - 1] + 1 in free)
        assert count - before == {layer: 2 for layer in kept[passed:]}
    assert not any("forward" in vars(layer) for layer in decoder_of(model).layers)


def test_streams_are_those_of_the_layers_reached_last():
    model = tiny_model("llama")
    prefix = PrefixCache(model, anatomy(model), [tokens()])
    for kept in ([0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]):
        prefix.reach(kept[:-1])
        with only_layers(model, 4, kept):
            wanted = final_states(model, tokens())
        with prefix.rest(0, kept):
            assert torch.equal(final_states(model, tokens()), wanted)


def test_layers_that_are_done_are_not_run_again():
    model = tiny_model("llama")
    prefix, count = PrefixCache(model, anatomy(model), [tokens()]), Counter()
    counted(model, count)
    for layers in ([0], [0], [0, 2], [0, 2, 3]):
        prefix.reach(layers)
    assert count == {0: 1, 2: 1, 3: 1}
    prefix.reach([])
    assert prefix.streams == [None]


def test_choices_tried_in_turn_share_what_they_begin_with_and_keep_a_layer_to_run():
    model = tiny_model("llama")
    prefix = PrefixCache(model, anatomy(model), [tokens()])
    tried = [([1, 2, 3], []), ([0, 2, 3], []), ([0, 1, 3], [0]), ([0, 1, 3], [0, 1]), ([0, 1], [0]), ([1, 2], [])]
    for kept, done in tried:
        prefix.reach_for(kept)
        assert prefix.done == done
        with only_layers(model, 4, kept):
            wanted = final_states(model, tokens())
        with prefix.rest(0, kept):
            assert torch.equal(final_states(model, tokens()), wanted)
