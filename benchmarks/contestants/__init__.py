"""Each function here is one contestant's work, run in a process of its own; it returns plain values."""
