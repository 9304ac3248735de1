"""The experts of a decoder in plain numbers: what they weigh, and how many of them a batch of tokens reads."""

from dataclasses import dataclass, replace

from pipeline.model.anatomy import Anatomy
from pipeline.model.shape import Shape


@dataclass(frozen=True)
class Mixture:
    """`experts` routed experts of `neurons` each in `sparse` layers of the teacher; the other `dense` have one FFN.

    A token uses `top` of them, and `shared` neurons of an FFN that every token passes through. `beside`: sparse layers
    have the FFN of dense ones too.
    """

    sparse: int
    dense: int
    experts: int
    top: int
    neurons: int
    shared: int = 0
    beside: bool = False

    @staticmethod
    def of(anatomy: Anatomy) -> "Mixture | None":
        """Return the experts of a model; None where it has none."""
        layers = range(len(anatomy.sizes.layers))
        sparse = [layer for layer in layers if anatomy.routing and anatomy.sparse(layer)]
        if anatomy.routing is None or not sparse:
            return None
        carried = anatomy.sizes.carried
        letters = {
            letter
            for name, segments in anatomy.layer_tensors.items()
            if anatomy.has(name, sparse[0])
            for segment in segments
            for axis in segment
            for letter in axis.split()
        }
        return Mixture(
            sparse=len(sparse),
            dense=len(layers) - len(sparse),
            experts=carried["e"],
            top=anatomy.routing.top,
            neurons=carried["x"],
            shared=carried["y"] if anatomy.shared_writer else 0,
            beside="f" in letters,
        )

    def changed(self, shape: Shape) -> "Mixture":
        """Return the experts of a student of a shape."""
        return replace(
            self,
            experts=shape.experts or self.experts,
            neurons=shape.expert_neurons or self.neurons,
            shared=shape.shared_neurons or self.shared,
        )

    def layers(self, count: int) -> tuple[int, int]:
        """Return how many of `count` layers have experts, and how many do not: as many as can, whichever will stay."""
        sparse = min(count, self.sparse)
        return sparse, count - sparse

    def rows(self, neurons: int) -> tuple[int, int]:
        """Return the weights of the FFN per hidden channel of a layer with experts, its router included, and of one
        without; `neurons` are those of a dense FFN."""
        dense = 3 * neurons
        sparse = self.experts * (3 * self.neurons + 1) + 3 * self.shared + (dense if self.beside else 0)
        return sparse, dense

    def read(self, tokens: int) -> float:
        """Return the expected number of distinct experts that a batch of tokens is sent to, each to `top` of them,
        all alike: E (1 - (1 - k / E)^tokens)."""
        return self.experts * (1.0 - (1.0 - self.top / self.experts) ** tokens)
