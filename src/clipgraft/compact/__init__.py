"""A smaller CLIP out of a larger one: some of its blocks, some of its tokens, all else inherited."""
