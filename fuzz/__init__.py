"""Every reader of clipgraft over files that were broken on purpose: `python -m fuzz`, or `make fuzz`."""
