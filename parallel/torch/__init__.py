"""The engine on PyTorch: FSDP2, DTensor, and whole weights beside sharded masters."""
