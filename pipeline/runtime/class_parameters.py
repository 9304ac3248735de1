"""The parameters of a class and the checkpoint tensors that hold them: transformers fuses some of them, as experts."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from pipeline.model.families import family_of


class ClassParameters(Mapping[str, Tensor]):
    """The tensors of a checkpoint by the names of a class's parameters, each assembled when it is read.

    The names on disk are those that transformers saves the class under. A parameter of several tensors has the type of
    the first of them.
    """

    def __init__(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]):
        """Map the parameters of a model, which may be on the meta device, to tensors by their names on disk."""
        self._model, self._tensors = model, tensors
        self._family = family_of(model.config.model_type)
        self._shapes = {name: tuple(each.shape) for name, each in model.state_dict().items()}
        self._stored: dict[str, list[str]] = {}

    def split(self, name: str, values: Tensor) -> dict[str, Tensor]:
        """Return the tensors on disk, by name, of the values of a parameter."""
        found = revert_weight_conversion(self._model, {name: values})
        return {self._family.named(each): tensor for each, tensor in found.items()}

    def stored(self, name: str) -> list[str]:
        """Return the names on disk of a parameter's tensors."""
        if name not in self._stored:
            self._stored[name] = list(self.split(name, torch.empty(self._shapes[name], device="meta")))
        return self._stored[name]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._shapes:
            raise KeyError(name)
        stored = self.stored(name)
        if len(stored) == 1 and tuple(self._tensors[stored[0]].shape) == self._shapes[name]:
            return self._tensors[stored[0]]
        count = torch.Size(self._shapes[name]).numel()
        places = torch.arange(count, dtype=torch.int32 if count < 2**31 else torch.int64).view(self._shapes[name])
        whole = torch.empty(count, dtype=self._tensors[stored[0]].dtype)
        for each, taken in self.split(name, places).items():
            whole[taken.flatten().long()] = self._tensors[each].flatten()
        return whole.view(self._shapes[name])

    def __contains__(self, name: object) -> bool:
        return name in self._shapes and all(each in self._tensors for each in self.stored(str(name)))

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._shapes if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a model's tensors on the CPU, by their names on disk; a tied output matrix is left out."""
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    state = {name: each.detach().cpu() for name, each in model.state_dict().items() if name not in tied}
    family = family_of(model.config.model_type)
    return {family.named(name): each for name, each in revert_weight_conversion(model, state).items()}


def stored_tensors(parameters: ClassParameters, trained: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors on disk of trained parameters, one parameter at a time."""
    for name, values in trained:
        yield from parameters.split(name, values).items()
