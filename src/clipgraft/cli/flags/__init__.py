"""Flags of the command line: each is a field of an option group, or of a group that only a command has."""
