"""Compute both towers from their parts: the results of the models' own forwards in less time and memory."""
