"""How many attentions and FFNs a student loses: to numbers of layers that keep theirs, or to a size."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.allocate.sublayers import Part, Removed
from pipeline.config import Config
from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import check_axis
from pipeline.model.families.table import SUBLAYERS
from pipeline.model.sizes import LayerSizes
from pipeline.stages.student_shape import SizeLimit, size_limit


@dataclass(frozen=True)
class Target:
    """What a student without some sub-layers has: layers that keep each, or a size; of which layers, by which rules."""

    anatomy: Anatomy
    hosts: tuple[int, ...]  # the layers that stay
    keep_first: int  # of all layers: those that lose nothing
    counts: dict[str, int]  # by axis of SUBLAYERS
    limit: SizeLimit | None  # where there are no counts

    @property
    def parts(self) -> list[Part]:
        """The sub-layers of the layers that stay, upwards."""
        axes = [axis for axis in SUBLAYERS if axis in self.anatomy.family.sublayers]
        widths = self.anatomy.sizes.layers
        return [(host, axis) for host in self.hosts for axis in axes if getattr(widths[host], SUBLAYERS[axis])]

    def hosts_without(self, removed: Removed) -> tuple[int, ...]:
        """Return the layers that keep a sub-layer."""
        return tuple(host for host, _ in self._widths(removed))

    def allows(self, removed: Removed, part: Part) -> bool:
        """Whether one more sub-layer may be removed: a class needs one FFN, and one attention of its first layer's
        kind."""
        layer, axis = part
        if layer < self.keep_first or (
            self.counts and self._kept(removed, axis) <= self.counts.get(axis, len(self.hosts))
        ):
            return False
        left = self._widths((*removed, part))
        if not self.anatomy.required_layers.keys() <= {host for host, _ in left}:
            return False
        kinds = [self.anatomy.layer_types[host].partition(",")[0] for host, _ in left]
        attention = any(widths.groups for (_, widths), kind in zip(left, kinds, strict=True) if kind == kinds[0])
        return attention and any(widths.neurons for _, widths in left)

    def enough(self, removed: Removed) -> bool:
        """Whether the student has what was requested."""
        if self.limit is not None:
            return self.size(removed) <= self.limit.most
        return all(self._kept(removed, axis) <= count for axis, count in self.counts.items())

    def size(self, removed: Removed) -> float:
        """Return the student's size in the unit of the budget."""
        assert self.limit is not None
        left = self._widths(removed)
        types = tuple(self.anatomy.layer_types[host] for host, _ in left)
        sizes = self.limit.counted.sizes.of_layers([host for host, _ in left], (widths for _, widths in left))
        return self.limit.size(self.limit.counted.narrowed(sizes, types))

    def check(self) -> None:
        """Raise ValueError for counts that no student has and for a size below the least."""
        for axis, count in self.counts.items():
            check_axis(self.anatomy, axis)
            least, most = max(1, self.keep_first), self._kept((), axis)
            if not least <= count <= most:
                raise ValueError(f"shape.{axis}: {count} is outside {least}..{most}; choose a number of these")
        if self.limit is None:
            return
        removed: Removed = ()
        for part in reversed(self.parts):
            removed = (*removed, part) if self.allows(removed, part) else removed
        if not self.enough(removed):
            largest, smallest = (self.limit.shown(self.size(each)) for each in ((), removed))
            raise ValueError(
                f"budget.{self.limit.name}: {self.limit.requested:g} cannot be reached by removing attentions and "
                f"FFNs; this model reaches {smallest} to {largest}"
            )

    def _kept(self, removed: Removed, axis: str) -> int:
        return sum(bool(getattr(widths, SUBLAYERS[axis])) for _, widths in self._widths(removed))

    def _widths(self, removed: Removed) -> list[tuple[int, LayerSizes]]:
        """Return the layers that keep anything, with their widths."""
        widths = {host: self.anatomy.sizes.layers[host] for host in self.hosts}
        for layer, axis in removed:
            lost = {"heads": 0, "groups": 0} if axis == "attention_layers" else {"neurons": 0}
            widths[layer] = replace(widths[layer], **lost)
        return [(host, own) for host, own in widths.items() if own.groups or own.neurons]


def target_of(config: Config, anatomy: Anatomy, hosts: Sequence[int]) -> Target:
    """Return what the configuration requests of a student that has these layers of the teacher."""
    counts = config.shape.sublayers
    limit = None if counts else size_limit(config, anatomy)
    return Target(anatomy, tuple(hosts), config.plan.keep_first, counts, limit)
