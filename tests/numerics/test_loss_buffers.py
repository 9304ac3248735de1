"""What the losses hold at most, in tensors of a block of logits: the numbers that estimates are made with."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused.reference import KINDS
from pipeline.distill import next_token
from pipeline.distill.chunk import AUTOGRAD, CLOSED_FORM, HELD, Terms, compare
from pipeline.distill.divergences import DIVERGENCES
from pipeline.distill.loss import IGNORED, work_space
from pipeline.model.logits import PLAIN, LogitForm

TOKENS, VOCABULARY = 7, 501
LARGE = TOKENS * VOCABULARY * 4  # bytes


class Peak(TorchDispatchMode):
    """The most bytes of tensors of the block's size that exist at once, without those given."""

    def __init__(self, *given):
        super().__init__()
        self.given = {each.untyped_storage()._cdata for each in given}
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor) and each.untyped_storage().nbytes() >= LARGE:
                storage = each.untyped_storage()
                if storage._cdata not in self.alive and storage._cdata not in self.given:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.alive.values()))
        return result


def peak(method, kind, weight, form):
    terms = Terms(kind, 0.3, 1.5, weight, form, form, method)
    student, teacher = torch.randn(TOKENS, VOCABULARY), torch.randn(TOKENS, VOCABULARY)
    labels = torch.arange(TOKENS)
    targets = (labels, torch.full((TOKENS,), weight / TOKENS)) if weight else None
    with Peak(student, teacher) as held:
        buffers = [torch.empty(TOKENS, VOCABULARY) for _ in range(terms.buffers)]
        compare(student, teacher, targets, terms, TOKENS, buffers)
    return held.most / LARGE


@pytest.mark.parametrize("method", [AUTOGRAD, CLOSED_FORM, "reference"])
def test_a_method_holds_what_it_says_and_no_more(method):
    forms = (PLAIN, LogitForm(1.3, 3.0))
    kinds = KINDS if method == "reference" else DIVERGENCES
    found = [peak(method, kind, weight, form) for kind in kinds for weight in (0.0, 0.5) for form in forms]
    assert max(found) == HELD[method]


def test_the_next_token_loss_holds_what_it_says():
    class Body(torch.nn.Module):
        config = SimpleNamespace(model_type="cohere", final_logit_softcapping=3.0, logit_scale=1.3)

        def get_output_embeddings(self):
            return torch.nn.Linear(2, VOCABULARY, bias=False)

    head = next_token.LanguageHead(Body(), TOKENS)
    hidden, labels = torch.randn(1, TOKENS, 2, requires_grad=True), torch.full((1, TOKENS), IGNORED)
    labels[0, :3] = 1
    with Peak() as held:
        head(hidden, labels)
    assert held.most / LARGE == next_token.HELD


def test_an_estimate_asks_for_the_method_of_the_device():
    plain = work_space("jsd", "auto", "cuda", 0.0, PLAIN, PLAIN)
    assert plain.buffers == 0 and work_space("jsd", "auto", "cuda", 0.5, PLAIN, PLAIN).buffers == 3
    npu = work_space("jsd", "auto", "npu", 0.0, PLAIN, PLAIN)
    assert npu.buffers == HELD[CLOSED_FORM] and npu.bytes(10) == 4 * npu.buffers * 10
    assert npu.bytes(npu.logits * 2) == npu.bytes(npu.logits)
    assert work_space("jsd", "auto", "cpu", 0.0, PLAIN, PLAIN).logits < npu.logits
