"""How good a model is: numbers from features, and pictures of them."""
