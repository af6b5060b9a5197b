"""The book's questions: records and tables, seeds, ablations, tuning, quality, speed, co-occurrence."""
