"""Errors of the Hugging Face hub as messages with a remedy."""


def hub_reason(fault: BaseException) -> str:
    """Return why something could not be fetched from the hub, in one line; that of the first known fault behind it."""
    link: BaseException | None = fault
    while link is not None:
        for kind in type(link).__mro__:
            if kind.__name__ in REASONS:
                return REASONS[kind.__name__]
        link = link.__cause__ or link.__context__
    return " ".join(str(fault).split())[:160] or type(fault).__name__


# By the name of an exception's class, of huggingface_hub and the network libraries under it, which change.
REASONS = {
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set and it was not fetched before; unset it, or give a folder",
    "GatedRepoError": "its owner asks for consent; accept its terms on its page, and log in with `hf auth login`",
    "RepositoryNotFoundError": "the hub has none of that name, or it is private; check it, or run `hf auth login`",
    "DatasetNotFoundError": "the hub has none of that name, or it is private; check it, or run `hf auth login`",
    "RevisionNotFoundError": "the hub has no such revision; check it",
    "NetworkError": "the hub cannot be reached from here; check the network and HF_ENDPOINT, or give a folder",
    "TimeoutException": "the hub does not answer in time; try again, set HF_ENDPOINT, or give a folder",
    "ConnectionError": "the hub cannot be reached from here; check the network and HF_ENDPOINT, or give a folder",
    "HfHubHTTPError": "the hub answers with an error; try again later",
}
