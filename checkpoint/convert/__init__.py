"""Checkpoints of other programs, in and out: Hugging Face, DeepSpeed, PyTorch DCP."""
