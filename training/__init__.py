"""From text to a trained model: data, corpus, presets, the loop, evaluation."""
