"""What a model is and what it costs: layer tables, multiply-adds, training memory. Nothing is computed."""
