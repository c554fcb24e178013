"""What a run hands over: a folder of results, and a page."""
