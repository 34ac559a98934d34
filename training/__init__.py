"""From text to a trained run: data, presets, optimizer, loop, evaluation."""
