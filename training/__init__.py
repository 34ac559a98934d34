"""From text to a trained model: data, corpus, presets, the loop, evaluation.

docs/library.md shows how to use the package from Python.
"""

import os

# Idle OpenMP workers wait actively for their next share, by default for so long that another busy
# process slows each region of this one many times over. libgomp reads this when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from training.config import TrainingConfig
from training.presets import get_preset
from training.run_directory import create_run, resume_run
from training.trainer import Trainer

__all__ = ["Trainer", "TrainingConfig", "create_run", "get_preset", "resume_run"]
