"""`python -m benchmarks.serve`: clipgraft's server beside infinity on the same local CLIP folder."""
