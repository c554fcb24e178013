"""What can be learnt, and from what: one file a recipe."""
