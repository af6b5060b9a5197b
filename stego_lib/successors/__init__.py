"""STEGO's successors, on the same features: one file a method."""
