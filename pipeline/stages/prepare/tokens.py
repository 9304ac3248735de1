"""tokens: the configured texts, tokenised once by the teacher's tokenizer and packed, evaluation kept apart."""

from pathlib import Path

from pipeline.config import Config
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_loader import load_tokenizer
from pipeline.runtime.model_source import model_folder
from pipeline.stages.stage import Inputs, Stage
from pipeline.stages.texts import check_positions, check_texts, settings, write_texts


def check(config: Config) -> None:
    """Refuse texts that could not be read or split, before any work; reads heads and small files, fetches no text.

    Chats are rendered where the teacher's tokenizer is at hand, as in a model folder.
    """
    folder, trusted = model_folder(config.model.path, config.model.allow_pickle), config.model.trust_remote_code
    if folder:
        check_positions("data.sequence_length", config.data.sequence_length, folder)
    known = folder if folder and (folder / "tokenizer_config.json").is_file() else None
    check_texts(config, lambda: None if known is None else load_tokenizer(known, trusted))


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write calibration/, recovery/, evaluation/<nn-name>/ and tokens.json (see `write_texts`)."""
    write_texts(config, inputs["teacher"], out, machine)


STAGE = Stage(
    name="tokens",
    makes="tokens",
    run=run,
    settings=settings,
    needs=("teacher",),
    becomes=("reference_tokens",),
    check=check,
    all_ranks=False,
    revision=3,
    shows={"tokens": ""},
)
