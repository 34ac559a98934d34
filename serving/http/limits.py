"""What one client may ask of a server, and how long it may take: the options of `serve`."""

from dataclasses import dataclass

from gpt.cli import MaybeInt

STREAM_INTERVAL = 0.04
"""Seconds: tokens that come faster are told together, 25 times a second."""


def check_minimums(options: object, **least: int) -> None:
    """A ValueError names an option that is smaller."""
    for name, limit in least.items():
        value = getattr(options, name)
        if value is not None and value < limit:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least {limit}, not {value}")


@dataclass(frozen=True)
class Limits:
    """Of a request; one that asks for more is refused with a message that says how much may be."""

    max_prompt_tokens: MaybeInt = None
    """Tokens of a prompt; as many as the model's context holds when not given, 65,536 where that has no end."""
    max_tokens: int = 65_536
    """Tokens of a text."""
    max_sequences: int = 128
    """Texts of a request: its prompts times `n`."""
    max_stop_strings: int = 4
    """Stop strings."""
    max_stop_length: int = 256
    """Characters of a stop string."""
    max_logprobs: int = 5
    """Likeliest tokens that are told beside each."""
    max_num_beams: int = 16
    """Translations followed at once by a beam search."""
    max_xray_tokens: int = 256
    """Tokens of an X-ray."""
    max_body_bytes: int = 4 * 2**20
    """Bytes of a request's body."""

    def __post_init__(self) -> None:
        check_minimums(
            self,
            max_prompt_tokens=1,
            max_tokens=1,
            max_sequences=1,
            max_stop_length=1,
            max_num_beams=1,
        )
        check_minimums(
            self, max_body_bytes=1, max_stop_strings=0, max_logprobs=0, max_xray_tokens=1
        )

    def described(self) -> str:
        """For the documentation, in Markdown."""
        prompt = self.max_prompt_tokens or "as many as the model's context holds"
        lines = {
            "tokens of a prompt": prompt,
            "max_tokens": self.max_tokens,
            "texts of a request (prompts times n)": self.max_sequences,
            "stop strings": f"{self.max_stop_strings}, of {self.max_stop_length} characters each",
            "logprobs": self.max_logprobs,
            "num_beams": self.max_num_beams,
            "tokens of an X-ray": self.max_xray_tokens,
            "bytes of a body": self.max_body_bytes,
        }
        return "\n".join(f"- {name}: {most}" for name, most in lines.items())


@dataclass(frozen=True)
class Timeouts:
    """For clients; and for texts, when the server is told to stop."""

    header_timeout: float = 10.0
    """Seconds that a client may take from a connection, or a request's first byte, to the end of its head."""
    body_timeout: float = 30.0
    """Seconds that it may take from there to the end of its body."""
    idle_timeout: float = 30.0
    """Seconds between two requests of a connection."""
    max_connections: int = 1024
    """Open connections."""
    shutdown_timeout: float = 30.0
    """Seconds that texts have to end in when the server is told to stop."""

    def __post_init__(self) -> None:
        check_minimums(self, max_connections=1)
        for name in ("header_timeout", "body_timeout", "idle_timeout"):
            if not 0 < getattr(self, name) < 1e6:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be above 0, not {getattr(self, name)}"
                )
        if not 0 <= self.shutdown_timeout < 1e6:
            raise ValueError(f"--shutdown-timeout must be at least 0, not {self.shutdown_timeout}")
