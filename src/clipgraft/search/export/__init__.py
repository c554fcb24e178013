"""Copy the vectors of an encoded folder to what other programs read; one module for each of them."""
