"""Limits of requests and timeouts of clients: options of `serve`."""

from dataclasses import dataclass, fields

from gpt.cli import OptionalInt


def check_minimums(options: object, **minimums: int) -> None:
    """Raise a ValueError that names the first option below its minimum, or above 2^63 - 1."""
    for name, minimum in minimums.items():
        value, option = getattr(options, name), name.replace("_", "-")
        if value is not None and not value >= minimum:  # also refuses NaN
            raise ValueError(f"--{option} must be at least {minimum}, not {value}")
        if value is not None and value >= 2**63:
            raise ValueError(f"--{option} must be at most {2**63 - 1}, not {value}")


@dataclass(frozen=True)
class Limits:
    """Limits of one request. A request above a limit gets a 400 response that names the limit."""

    max_prompt_tokens: OptionalInt = None
    """Maximum tokens of a prompt; default: what the model's context holds, 65,536 for models without a maximum length."""
    max_tokens: int = 65_536
    """Maximum output tokens (`max_tokens`) of each choice."""
    max_sequences: int = 128
    """Maximum choices: number of prompts times `n`."""
    max_stop_strings: int = 4
    """Maximum number of stop strings."""
    max_stop_length: int = 256
    """Maximum characters of a stop string."""
    max_logprobs: int = 5
    """Maximum `logprobs`: likeliest tokens returned at each position."""
    max_num_beams: int = 16
    """Maximum beams of a beam search (`num_beams`)."""
    max_xray_tokens: int = 256
    """Maximum tokens of an X-ray, source and target together."""
    max_body_bytes: int = 4 * 2**20
    """Maximum bytes of the request body; above it, the response is 413."""

    def __post_init__(self) -> None:
        ones = dict.fromkeys((field.name for field in fields(self)), 1)
        check_minimums(self, **{**ones, "max_stop_strings": 0, "max_logprobs": 0})

    def to_markdown(self) -> str:
        """Return a list for the API documentation."""
        limits = {
            "prompt tokens": self.max_prompt_tokens or "what the model's context holds",
            "max_tokens": self.max_tokens,
            "choices (prompts times n)": self.max_sequences,
            "stop strings": f"{self.max_stop_strings}, of {self.max_stop_length} characters each",
            "logprobs": self.max_logprobs,
            "num_beams": self.max_num_beams,
            "X-ray tokens": self.max_xray_tokens,
            "body bytes": self.max_body_bytes,
        }
        return "\n".join(f"- {name}: {limit}" for name, limit in limits.items())


@dataclass(frozen=True)
class Timeouts:
    """Timeouts of clients and of the shutdown."""

    header_timeout: float = 10.0
    """Seconds in which a client must send a request's head, from the connection or the head's first byte on; then 408."""
    body_timeout: float = 30.0
    """Seconds in which a client must send the body, from the end of the head on; then 408."""
    idle_timeout: float = 30.0
    """Seconds after which an idle connection is closed (keep-alive)."""
    max_connections: int = 1024
    """Maximum open connections; further ones get a 503 response."""
    shutdown_timeout: float = 30.0
    """Seconds that running sequences have to finish after SIGTERM or Ctrl-C; then they end with an error event."""

    def __post_init__(self) -> None:
        check_minimums(self, max_connections=1)
        for part in ("header", "body", "idle"):
            seconds = getattr(self, f"{part}_timeout")
            if not 0 < seconds < 1e6:
                raise ValueError(f"--{part}-timeout must be above 0, not {seconds}")
        if not 0 <= self.shutdown_timeout < 1e6:
            raise ValueError(f"--shutdown-timeout must be at least 0, not {self.shutdown_timeout}")
