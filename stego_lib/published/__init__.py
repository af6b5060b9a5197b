"""The checkpoints that STEGO's authors released."""
