"""Speed and memory compared with a plain baseline in the same run: `make bench`, or `python -m benchmarks ROW ...`.

Weights are random and images synthetic, because time and memory depend only on shapes.
"""
