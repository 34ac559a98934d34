"""The Hugging Face hub: whether it can be reached, models and tokenizers from it, models to it.

`huggingface_hub` and `datasets` wait for some answers forever, and try each request that fails six times.
Their client is made here, with timeouts and an end to their patience: a hub that becomes silent, or answers
only errors, is given up within a minute.
"""

import contextlib
import logging
import sys
import threading
import time
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils._validators import validate_repo_id
from huggingface_hub.utils.tqdm import disable_progress_bars

HUB_TIMEOUT_SECONDS = 4.0
"""Time in which the hub must respond to a request, or send more of a file."""
UPLOAD_TIMEOUT_SECONDS = 60.0
"""Time in which it must confirm what was sent to it."""
PATIENCE_SECONDS = 10.0
"""Time without any answer, or with errors of the server only, after which nothing is asked again."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES)

# Each try that fails would be a line of its own, and some bars are drawn into files too.
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
if not sys.stderr.isatty():
    disable_progress_bars()


class Patience:
    """Limits how long the client waits for the hub."""

    silent_since: float | None = None
    """Time of the first request of those that have no answer yet; uploads do not count."""

    def on_request(self, request: httpx2.Request) -> None:
        """Set the timeouts of a request; a ValueError if the hub has been silent for too long."""
        timeout = dict.fromkeys(("connect", "read", "write", "pool"), HUB_TIMEOUT_SECONDS)
        if request.method not in ("GET", "HEAD"):
            timeout["read"] = UPLOAD_TIMEOUT_SECONDS
        elif self.silent_since is None:
            self.silent_since = time.monotonic()
        elif time.monotonic() - self.silent_since > PATIENCE_SECONDS:
            raise ValueError(
                "the hub has stopped answering, or answers only errors: try again later"
            )
        request.extensions["timeout"] = timeout

    def on_response(self, response: httpx2.Response) -> None:
        """Note that the hub answers."""
        if response.status_code < 500:
            self.silent_since = None


patience = Patience()


def _make_client() -> httpx2.Client:
    client = default_client_factory()
    client.event_hooks["request"].append(patience.on_request)
    client.event_hooks["response"].append(patience.on_response)
    return client


huggingface_hub.set_client_factory(_make_client)


def check_hub_is_reachable() -> None:
    """Raise a ValueError within seconds where `datasets` would retry for half a minute."""
    endpoint = constants.ENDPOINT
    responses: list[object] = []
    patience.silent_since = None

    def request() -> None:
        with contextlib.suppress(Exception):
            responses.append(huggingface_hub.get_session().head(endpoint))

    # In a thread, because a DNS lookup has no timeout of its own.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_SECONDS)
    if not responses:
        raise ValueError(f"the hub ({endpoint}) cannot be reached")


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a folder to the hub and return its address; a ValueError says why that failed."""
    api = huggingface_hub.HfApi()
    try:
        check_hub_is_reachable()
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # The library raises errors of many kinds.
        raise ValueError(
            f"{name} could not be pushed ({hub_error_reason(error)}): the folder {folder} is complete; "
            f"once `hf auth login` has succeeded: hf upload {name} {folder}"
        ) from error
    return f"{constants.ENDPOINT}/{name}"


def download(name: str, revision: str | None = None, files: tuple[str, ...] = MODEL_FILES) -> Path:
    """Download files of a model of the hub to its cache, and return their folder.

    Raises:
        ValueError: The hub cannot be reached, has no such model or revision, or sent other files
            than it lists; those are removed.
    """
    try:
        validate_repo_id(name)
        if not constants.HF_HUB_OFFLINE:
            check_hub_is_reachable()
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(files)
        )
        if damaged := remove_damaged(name, Path(folder).name, "model"):
            raise ValueError(damaged)
    except Exception as error:  # The library raises errors of many kinds.
        raise ValueError(
            f"{name}: no such file or folder, nor can it be had from the hub: "
            f"{hub_error_reason(error)}"
        ) from error
    return Path(folder)


def remove_damaged(name: str, commit: str, repo_type: str) -> str:
    """Remove downloaded files that are not what the hub lists; return what to say of them, or ""."""
    if constants.HF_HUB_OFFLINE:
        return ""
    result = huggingface_hub.HfApi().verify_repo_checksums(
        name, revision=commit, repo_type=repo_type
    )
    paths = [result.verified_path / mismatch["path"] for mismatch in result.mismatches]
    for path in paths:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
    names = ", ".join(path.name for path in paths)
    return names and f"what was received as {names} has another checksum: try again"


def hub_error_reason(error: BaseException) -> str:
    """Return in one line why the hub did not do what was asked."""
    # What wraps another error tells less.
    if isinstance(error, LocalEntryNotFoundError | RuntimeError) and error.__cause__:
        return hub_error_reason(error.__cause__)
    if isinstance(error, GatedRepoError):
        return "it is gated: accept its terms on its page, then `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, RepositoryNotFoundError):
        return "none of that name, or it is private: then `hf auth login`, or set HF_TOKEN"
    if isinstance(error, HfHubHTTPError) and error.server_message:
        return f"{error.response.status_code} {error.server_message.splitlines()[0]}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
