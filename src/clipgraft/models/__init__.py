"""Base models of both families, as one `Clip` with named sites."""
