"""Speed and memory, each beside a plain baseline in the same run: `make bench`, or `python -m benchmarks ROW ...`.

Weights are random and images are drawn: they have the right shapes, which is all that time and memory depend on.
"""
