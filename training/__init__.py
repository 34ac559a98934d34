"""From text to a trained model: data, corpus, presets, the loop, evaluation."""

import os

# Idle OpenMP workers wait actively for their next share, by default for so long that another busy
# process slows each region of this one many times over. libgomp reads this when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
