"""Give every reader of clipgraft damaged files: `python -m fuzz`, or `make fuzz`."""
