"""Fetching a base from the Hugging Face Hub into its cache."""

import re
from pathlib import Path

from hyconvert.checkpoint.folder import AUXILIARY_PATTERNS, INDEX_FILE
from hyconvert.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PATTERNS = ["config.json", INDEX_FILE, "model.safetensors", "model-*.safetensors", *AUXILIARY_PATTERNS]


def looks_like_hub_id(base: str) -> bool:
    """Whether `base` could be a Hub id, `name` or `owner/name`."""
    return _HUB_ID.fullmatch(base) is not None and not base.endswith(".gguf")


def download(repo: str, *, revision: str | None, token: str | None, with_code: bool) -> Path:
    """Download what a conversion needs of a model repository, or find it in the cache.

    Args:
        repo: Hub id.
        revision: Branch, tag or commit; None for the default branch.
        token: Access token; None for the one that is logged in, if any.
        with_code: Fetch the repository's Python files as well.

    Returns:
        The snapshot's folder in the Hub cache.

    Raises:
        CheckpointError: The repository cannot be reached or read, and is not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*_PATTERNS, "*.py"] if with_code else _PATTERNS
    tried = f"no file or folder of that name exists in {Path.cwd()}"
    try:
        return Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=patterns))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo!r} on the Hugging Face Hub is gated; accept its terms there and log in (`hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repo!r} on the Hugging Face Hub has no revision {revision!r}; check it"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"BASE {repo!r} was not found: {tried}, and the Hugging Face Hub has no such model (or it is private); "
            "check the spelling, or log in (`hf auth login`)"
        ) from error
    except OSError as error:
        cause = str(error).strip().splitlines()
        raise CheckpointError(
            f"BASE {repo!r} was not found: {tried}, it is not in the Hub cache, and the Hugging Face Hub "
            f"could not be reached ({cause[0] if cause else type(error).__name__}); "
            "check the spelling and the connection, or give a local folder or .gguf file"
        ) from error
