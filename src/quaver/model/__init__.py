"""The model in plain PyTorch, held against the official code number by number."""
