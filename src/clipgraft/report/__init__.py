"""Write the results of a run, an HTML page on several, and the card with which an adapter is published."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
