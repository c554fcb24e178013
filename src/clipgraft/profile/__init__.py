"""What a model is and what it costs: layer tables, multiply-adds, training memory, from shapes alone."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
