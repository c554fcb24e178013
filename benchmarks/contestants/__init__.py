"""The work of each contestant: one function, run in its own process, that returns plain values."""
