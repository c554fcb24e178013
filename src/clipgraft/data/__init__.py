"""Images with captions or classes: reading, checking, loading, and cached features."""
