"""The contract of a stage: one typed value that says what it reads, what it makes and how it runs."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.runtime.machine import Machine

Inputs = Mapping[str, Path]  # the folder of each artifact that a stage reads, by name


def always(config: Config) -> bool:
    """Return True: every configuration asks for the stage."""
    return True


def always_applies(config: Config, inputs: Inputs) -> bool:
    """Return True: the stage has work to do on any inputs."""
    return True


def no_check(config: Config) -> None:
    """Accept every configuration."""


def any_text(config: Config, tokens: Path) -> None:
    """Accept every text."""


def nothing_more(config: Config) -> tuple[str, ...]:
    """Return no further inputs."""
    return ()


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline: reads artifacts by name and fills one folder.

    The artifact is named by the digest of `name`, `revision`, what `settings` returns and the names of the inputs.
    `run` writes into an empty folder that becomes the artifact once it returns, or, with `resumable`, into the folder
    that an interrupted attempt left.

    Two model roles are bound by the runner, and a stage may rebind them (`becomes`): `teacher`, what the student learns
    from, and `subject`, what is pruned now. A third, `reference`, is what results are compared with and never changes.
    `tokens` are the texts in the ids of teacher and subject, `reference_tokens` in those of the reference.
    """

    name: str  # names the artifact's folder and enters its digest
    makes: str  # the name under which later stages read the artifact
    run: Callable[[Config, Inputs, Path, Machine], None]
    settings: Callable[[Config], dict[str, Any]]  # what determines the artifact beside its inputs
    needs: tuple[str, ...] = ()
    needs_also: Callable[[Config], tuple[str, ...]] = nothing_more  # inputs that depend on the configuration
    optional: tuple[str, ...] = ()  # read where the configuration asks for the stage that makes them
    becomes: tuple[str, ...] = ()  # roles, and earlier artifacts, whose place it takes for the stages after it
    enabled: Callable[[Config], bool] = always  # whether this configuration asks for the stage
    applies: Callable[[Config, Inputs], bool] = always_applies
    choices: Mapping[str, Collection[str]] = field(default_factory=dict)  # setting -> the names registered for it
    check: Callable[[Config], None] = no_check  # refuses bad settings before any work
    check_text: Callable[[Config, Path], None] = any_text  # refuses the packed text as soon as it is made
    all_ranks: bool = True  # False: rank 0 alone runs it
    resumable: bool = False  # keep the partial folder after a crash
    implied: bool = False  # runs with the stages that need it; recipes do not list it
    revision: int = 1  # raised when the same settings and inputs give another artifact
    shows: Mapping[str, str] = field(default_factory=dict)  # name in runs/<run>/ -> path inside the artifact
    delivers: bool = False  # the run folder gets what it shows as real files, not as links
