"""Every figure, and the interactive explorer."""
