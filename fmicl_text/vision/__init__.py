"""Image encoders, training data, augmentations and evaluation. Names are imported on first use (PEP 562)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
