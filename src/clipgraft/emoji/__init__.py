"""The embedded data set: pictures composed of open-licensed emoji, with captions and classes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
