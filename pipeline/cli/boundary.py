"""How a command ends: known faults in one line, unforeseen ones in one line that names where the traceback is."""

import os
import platform
import select
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TextIO

from pipeline.runtime.faults import REPORTER, PeerFailed

PACKAGE = Path(__file__).resolve().parents[1]
REFUSED, DEFECT, INTERRUPTED, UNREAD = 2, 70, 130, 141  # exit statuses; 70: EX_SOFTWARE, 141: as by SIGPIPE
VERSIONS = ("pangu-light", "torch", "transformers", "deepspeed", "hydra-core")


class Boundary:
    """Ends a command. `folder` is the run folder once it is known: tracebacks are written there."""

    folder: Path | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Turn exceptions of the block into a line on standard error and an exit status.

        With torchrun one rank of a node prints, and every rank writes its traceback. PIPELINE_TRACEBACK=1 lets
        exceptions through. Where the reader of the output has ended, as in `| head`, the command ends silently.
        """
        try:
            yield
            sys.stdout.flush()
        except (KeyboardInterrupt, Exception) as error:
            if os.environ.get("PIPELINE_TRACEBACK"):
                raise
            sys.exit(self.end(error))

    def end(self, error: BaseException) -> int:
        """Report an exception and return the exit status for it."""
        rank = os.environ.get("RANK", "0")
        if isinstance(error, BrokenPipeError) and _silence_unread():
            return UNREAD
        if isinstance(error, KeyboardInterrupt):
            if REPORTER.prints():
                _print("interrupted; run the same command again to resume")
            return INTERRUPTED
        line, status = known(error), REFUSED
        if line is None:
            status = DEFECT
            line = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            file = self.write(error, rank)
            line = f"internal error ({line}), a defect of this program; traceback in {file}: please report that file"
        if REPORTER.prints():
            _print(f"error: {line}")
        return status

    def write(self, error: BaseException, rank: str) -> Path:
        """Write traceback, versions and command into the run folder, else into a temporary one; return the file."""
        name = f"traceback-{time.strftime('%Y%m%d-%H%M%S')}{'' if 'RANK' not in os.environ else f'-rank{rank}'}.txt"
        lines = [
            *(f"{each} {_version(each)}" for each in VERSIONS),
            f"python {platform.python_version()} on {platform.platform()}",
            f"command: {sys.argv}",
            "",
            "".join(traceback.format_exception(error)),
        ]
        text = "\n".join(lines)
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
                return self.folder / name
            except OSError:
                pass  # a full or read-only disk may be the reason: the temporary folder is next
        file = Path(tempfile.mkdtemp(prefix="pangu-light-")) / name
        file.write_text(text, encoding="utf-8", errors="backslashreplace")
        return file


def known(error: BaseException) -> str | None:
    """Return the line for a fault of the input, the machine or another rank; None for one that nobody foresaw.

    A ValueError is known where this program raised it: one that a library raised went past our checks.
    """
    if isinstance(error, OSError):
        if error.filename is not None:
            files = [error.filename] if error.filename2 is None else [error.filename, error.filename2]
            return f"{' -> '.join(map(str, files))}: {error.strerror}"
        return _flat(error)
    if isinstance(error, MemoryError):
        return "out of memory on the host; lower calibration.batch_size or distill.micro_batch_size"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, by name: it need not be loaded
        return (
            "out of memory on the device; lower distill.micro_batch_size, calibration.batch_size or logits.chunk, or "
            "set distill.gradient_checkpointing=true or deepspeed=zero3"
        )
    if isinstance(error, FloatingPointError | PeerFailed):
        return _flat(error)
    return _flat(error) if type(error) is ValueError and _raised_here(error) else None


def _raised_here(error: BaseException) -> bool:
    """Return whether the innermost frame of an exception's traceback lies in this program."""
    frames = traceback.extract_tb(error.__traceback__)
    return not frames or Path(frames[-1].filename).resolve().is_relative_to(PACKAGE)


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _silence_unread() -> bool:
    """Discard what is still written to a standard stream that nobody reads any more; return whether there is one."""
    unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
    for stream in unread:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
    return bool(unread)


def _is_unread(stream: TextIO) -> bool:
    with suppress(OSError, ValueError):  # a stream without a descriptor is no pipe
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    return False


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
