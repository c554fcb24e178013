"""Write the results of a run, and an HTML page on several runs."""
