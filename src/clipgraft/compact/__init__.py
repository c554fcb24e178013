"""A smaller CLIP out of a larger one: some of its blocks, some of its tokens, all else inherited."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
