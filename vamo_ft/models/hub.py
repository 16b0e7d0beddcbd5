"""Model folders on the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from vamo_ft.core.errors import UsageError
from vamo_ft.models.folder import first_words

__all__ = ["check_push", "push_folder"]


def check_push(repo: str, *, offline: bool) -> None:
    """Refuses what could not be uploaded anyway, before any work is done.

    Raises:
        UsageError: the name is none, there is no token, or no network may be used.
    """
    try:
        try_to_load_from_cache(repo, "README.md")  # asks no network, and knows what a name may be
    except HFValidationError as error:
        raise UsageError(f"--push-to-hub: {first_words(error)}") from None
    if "/" not in repo:
        raise UsageError(f"--push-to-hub: {repo} names no owner; write OWNER/{repo}")
    if offline or constants.HF_HUB_OFFLINE:
        raise UsageError(
            "--push-to-hub: no network call is made (run.offline: true, or HF_HUB_OFFLINE is set); export without it"
        )
    if get_token() is None:
        raise UsageError("--push-to-hub: there is no token; set HF_TOKEN, or log in with 'hf auth login'")


def push_folder(directory: Path, repo: str, *, private: bool, message: str) -> str:
    """Makes the repository where there is none, and uploads every file in one commit.

    The token is the environment's or that of `hf auth login`; it is not touched here.

    Args:
        private: of a new repository.
        message: of the commit.

    Returns:
        The repository's address.

    Raises:
        UsageError: the Hub refused or could not be reached; the folder stays.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=str(address.repo_id), folder_path=directory, commit_message=message)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UsageError(
            f"--push-to-hub: {repo} could not be uploaded: {first_words(error)}; the model is in {directory}"
        ) from error
    return str(address)
