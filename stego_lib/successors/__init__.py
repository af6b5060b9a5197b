"""Successors of STEGO on the same features, one method per file."""
