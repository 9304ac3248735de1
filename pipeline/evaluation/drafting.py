"""The student as draft model of its teacher: the share of drafted tokens that speculative sampling accepts.

At a position with the teacher's distribution p and the student's q, a token drawn from q is accepted with probability
Σ min(p, q) (Leviathan et al., 2211.17192). With a share a, drafts of k tokens give (1 - a^(k+1)) / (1 - a) tokens per
pass of the teacher, if acceptances are independent.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.evaluation.divergence import final_states
from pipeline.model.causal import CausalModel
from pipeline.model.logits import logits_of

DRAFTED = 4  # tokens of a draft, for the expected tokens per pass


@torch.inference_mode()
def accepted(reference: CausalModel, student: CausalModel, batches: Iterable[Tensor], chunk: int) -> Iterator[Tensor]:
    """Yield for each batch of ids [b, t] the sum of Σ min(p, q) over the positions of each sequence, [b] float64.

    The last position of a sequence, whose next token is not in the text, counts like the others. Logits exist for
    `chunk` tokens at once.
    """
    for ids in batches:
        states = [final_states(model, ids.to(next(model.parameters()).device)) for model in (reference, student)]
        shares = [
            _overlap(logits_of(reference, theirs), logits_of(student, ours))
            for theirs, ours in zip(*(each.split(chunk) for each in states), strict=True)
        ]
        yield torch.cat(shares).view(ids.shape).sum(1)


def _overlap(theirs: Tensor, ours: Tensor) -> Tensor:
    """Return Σ min(p, q) of logits [t, v], [t] float64 on the CPU; rows beyond both vocabularies belong to no token."""
    width = min(theirs.shape[-1], ours.shape[-1])
    p, q = (x[:, :width].to(torch.promote_types(x.dtype, torch.float32)).softmax(-1) for x in (theirs, ours))
    return torch.minimum(p, q).sum(-1).to("cpu", torch.float64)


def figures(shares: Tensor) -> dict[str, Any]:
    """Return the acceptance of sequences [n], its standard error over them, and the tokens per pass of the teacher."""
    share = float(shares.mean())
    error = float(shares.std() / len(shares) ** 0.5) if len(shares) > 1 else None
    tokens = sum(share**drafted for drafted in range(DRAFTED + 1))
    return {"acceptance": share, "acceptance_error": error, "drafted": DRAFTED, "tokens_per_pass": tokens}
