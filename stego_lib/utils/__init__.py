"""Errors, notices, paths, progress, files, threads, devices. Imports nothing else of this package."""
