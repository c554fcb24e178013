"""clipgraft beside its peers, in one process tree: `python -m benchmarks`, or `make bench`.

The packages here use clipgraft; clipgraft never uses them.
"""
