"""The application around Hugging Face's Trainer: configuration, data, loop, checkpoints, results."""
