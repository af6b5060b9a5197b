"""Errors, notices, paths, progress, files, threads, devices. Imports no other module of this package."""
