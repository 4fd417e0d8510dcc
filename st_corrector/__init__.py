"""Train dense retrievers with hard negatives chosen at every step, from the whole corpus, by the model as it is now."""

import lazy_loader

from ._version import __version__ as __version__

# Each name is imported when it is asked for: what needs no torch, such as `st-corrector --help`, does not wait for it.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
