"""Log the metrics of a run to metrics.jsonl and, optionally, to TensorBoard."""

import json
from pathlib import Path
from typing import Any

from gpt.checkpoint import write_atomically


class MetricsLogger:
    """Appends JSON objects to metrics.jsonl, one per line.

    Args:
        directory: The run directory.
        tensorboard: Also write TensorBoard events; a ValueError if the package is missing.
        resume_step: Step that training continues from. Later lines and the final score are
            removed: they will be logged again.
    """

    def __init__(self, directory: Path, tensorboard: bool, resume_step: int) -> None:
        self.path = directory / "metrics.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        valid = [line for line in lines if _is_valid(line, resume_step)]
        write_atomically(self.path, "".join(f"{line}\n" for line in valid))
        self.writer = _summary_writer(directory, resume_step) if tensorboard else None

    def log(self, step: int, **values: Any) -> None:  # noqa: ANN401 (JSON values)
        """Append a line with the step and these values."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")
        if self.writer:
            for name, value in values.items():
                if isinstance(value, str):
                    self.writer.add_text(name, value, step)
                elif isinstance(value, int | float):
                    self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the TensorBoard events."""
        if self.writer:
            self.writer.close()


def _is_valid(line: str, resume_step: int) -> bool:
    """Whether a line is complete, from a step up to `resume_step`, and not the final score."""
    try:
        values = json.loads(line)
    except ValueError:
        return False
    return bool(values["step"] <= resume_step and "final_loss" not in values)


def _summary_writer(directory: Path, resume_step: int) -> Any:  # noqa: ANN401 (an optional dependency's type)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step + 1)
