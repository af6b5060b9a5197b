"""Frozen features: extracted once, kept on disk, or computed on demand."""
