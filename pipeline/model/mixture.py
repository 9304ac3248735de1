"""Mixtures of experts: how tokens are routed, and how many experts a student can have."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.model.families import Family


@dataclass(frozen=True)
class Routing:
    """A token is sent to `top` experts, those of `chosen` of the `groups` groups that experts are divided into."""

    top: int
    groups: int = 1
    chosen: int = 1

    def check(self, count: int, most: int) -> None:
        """Raise ValueError, naming the setting, where a student cannot have `count` of `most` experts."""
        fault = self.fault(count, most)
        if fault is not None:
            raise ValueError(f"shape.experts: {count} {fault}")

    def fault(self, count: int, most: int) -> str | None:
        """Return why a student cannot have `count` of `most` experts, and which it can; None where it can."""
        if not 1 <= count <= most:
            return f"is outside 1..{most} (the teacher's); choose a number of these"
        if count % self.groups:
            below = count // self.groups * self.groups
            near = " or ".join(str(value) for value in (below, below + self.groups) if value)
            return f"is no multiple of the {self.groups} groups; nearest: {near}"
        least = -(-self.top // self.chosen) * self.groups
        if self.groups > 1:  # a group is scored by its best two
            least = max(least, 2 * self.groups)
        if count >= least:
            return None
        return (
            f"is too few for tokens that are sent to {self.top} experts of {self.chosen} of {self.groups} groups; keep "
            f"at least {least}"
        )


def routing_of(config: Mapping[str, Any], family: Family) -> Routing | None:
    """Return how a model routes tokens; None where it has no experts."""
    if not family.experts or family.top_k is None:
        return None
    groups = (config.get(family.expert_groups) or 1) if family.expert_groups else 1
    chosen = config[family.chosen_groups] if family.chosen_groups and groups > 1 else 1
    return Routing(one_value(config, family.top_k), groups, chosen)


@dataclass(frozen=True)
class Narrowing:
    """How a config states the neurons of experts: `inner` of each routed one and, where there are shared experts, the
    field of their neurons, or that of their number, each with as many neurons as a routed one, or neither, where they
    have as many as one."""

    inner: str
    shared: str | None = None
    count: str | None = None
    coupled: bool = False  # the neurons of shared experts are stated by those of a routed one

    def fields(self, inner: int, shared: int | None) -> dict[str, int]:
        """Return the config fields of `inner` neurons of each routed expert and `shared` of the shared ones, if any."""
        own = {} if shared is None else {self.shared: shared} if self.shared else {}
        counted = {self.count: shared // inner} if self.count and shared is not None else {}
        return {self.inner: inner} | own | counted

    def fault(self, inner: int, shared: int | None) -> str | None:
        """Return why a config cannot state these numbers; None where it can."""
        if not self.coupled or shared is None:
            return None
        if self.count is None and shared != inner:
            return (
                f"{self.inner} states the neurons of a routed expert ({inner}) and of the shared one ({shared}); set "
                f"shape.expert_neurons and shape.shared_neurons to one number"
            )
        if shared % inner:
            near = [value for value in (shared // inner * inner, (shared // inner + 1) * inner) if value]
            return (
                f"{self.inner} * {self.count} states the {shared} neurons of the shared experts, which are no multiple "
                f"of the {inner} of a routed one; set shape.expert_neurons to a divisor of {shared}, or "
                f"shape.shared_neurons to {' or '.join(map(str, near))}"
            )
        return None


def narrowing_of(family: Family) -> Narrowing:
    """Return how the configs of a family with experts state the neurons of experts."""
    inner, (shared, *_) = family.lengths["x"][0], family.lengths.get("y", ("",))
    factors = shared.split("*") if shared else []
    if inner not in factors:
        return Narrowing(inner, shared or None)
    count = next((factor for factor in factors if factor != inner), None)
    return Narrowing(inner, None, count, coupled=True)


def experts_of(config: Mapping[str, Any], family: Family) -> int:
    """Return the number of experts of a layer. Raise ValueError where no field states it."""
    return one_value(config, next((name for name in family.experts if config.get(name) is not None), family.experts[0]))


def one_value(config: Mapping[str, Any], name: str) -> int:
    """Return a number of a config that may be stated once for each layer.

    Raise ValueError where it is no whole number, and where layers differ.
    """
    value = config.get(name)
    values: list[Any] = value if isinstance(value, list) and value else [value]
    if any(isinstance(each, bool) or not isinstance(each, int) for each in values):
        raise ValueError(f"config.json: {name} is {value!r:.60}, not a whole number; state it, or fetch the file again")
    if len(set(values)) > 1:
        raise ValueError(
            f"config.json: {name} is {sorted(set(values))} in different layers; give a model with one number"
        )
    return int(values[0])
