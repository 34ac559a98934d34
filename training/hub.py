"""Models on the Hugging Face hub, and whether the hub can be reached."""

import contextlib
import threading
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

HUB_TIMEOUT_SECONDS = 4.0
"""Time in which the hub must respond to a first request."""
MODEL_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json"]
MODEL_FILES += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]


def check_hub_is_reachable(name: str) -> None:
    """Raise a ValueError within seconds where `datasets` would retry for half a minute."""
    endpoint = huggingface_hub.constants.ENDPOINT
    responses: list[object] = []

    def request() -> None:
        with contextlib.suppress(Exception):
            session = huggingface_hub.get_session()
            responses.append(session.head(endpoint, timeout=HUB_TIMEOUT_SECONDS))

    # In a thread, because a DNS lookup has no timeout of its own.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_SECONDS)
    if not responses:
        raise ValueError(
            f"{name} is not a local file or folder, and the hub ({endpoint}) cannot be reached to "
            "look for it: give a local file or folder, or set HF_HUB_OFFLINE=1 if it has "
            "been downloaded before"
        )


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a folder to the hub and return its address; a ValueError says why that failed."""
    check_hub_is_reachable(name)
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except (HfHubHTTPError, ValueError, OSError) as error:
        raise ValueError(
            f"{name} could not be pushed ({_first_line(error)}): the folder {folder} is complete; "
            f"once `hf auth login` has succeeded: hf upload {name} {folder}"
        ) from error
    return f"{huggingface_hub.constants.ENDPOINT}/{name}"


def download(name: str, revision: str | None) -> Path:
    """Download a model of the hub to its cache, and return its folder; a ValueError says why it failed."""
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        check_hub_is_reachable(name)
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES)
        )
    except (HfHubHTTPError, ValueError, OSError) as error:
        raise ValueError(
            f"{name}: no such folder, nor can it be had from the hub: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
