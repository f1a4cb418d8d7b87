"""Evaluation of encoders: STS tasks, geometry of embeddings, probes, plots.

The public names are imported on first use (PEP 562): training imports `geometry` and should not import matplotlib.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
