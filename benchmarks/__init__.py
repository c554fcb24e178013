"""Compare clipgraft with its peers in one run: `python -m benchmarks`, or `make bench`.

The packages here use clipgraft; clipgraft never uses them.
"""
