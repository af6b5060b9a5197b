"""Frozen features: extracted once and kept on disk, or computed on demand."""
