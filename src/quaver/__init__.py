"""quaver: a Qwen3-TTS voice model, small, proven and fast."""
