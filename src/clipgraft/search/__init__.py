"""Encode what a folder, a table or an archive holds, index it, and search it."""
