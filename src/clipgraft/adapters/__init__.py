"""Adapters on disk, in the layout PEFT opens."""
