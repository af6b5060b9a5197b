"""What the method stands on: errors, notices, paths, progress, files, workers, devices. Imports nothing else of this package."""
