"""Whether the Hugging Face Hub can be reached."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_session

HUB_TIMEOUT = 5.0  # seconds until a Hub that does not answer counts as unreachable


def hub_answers() -> bool:
    """Whether the Hub answers within `HUB_TIMEOUT`; without this check, huggingface_hub tries for half a minute."""
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # of the HTTP library that huggingface_hub uses, or its own in offline mode
        return False
    return True


@contextmanager
def cache_if_unreachable() -> Iterator[None]:
    """Inside, libraries read their cache alone if the Hub does not answer; they would try for half a minute."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not hub_answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
