"""Classify with a few labelled images of each class."""
