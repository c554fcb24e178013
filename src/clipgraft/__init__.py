"""clipgraft: graft LoRA adapters onto CLIP models.

`__init__.pyi` lists the public names. Each is imported on first use, so that `import clipgraft` loads neither
torch nor anything else that is large.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = ["__version__", *_names]


def __dir__() -> list[str]:
    return __all__
