"""The public names of `clipgraft.train`; `fit`, `fit_classifier` and `distill` are flat."""

from .fit import FitResult as FitResult
from .fit_classes import fit_classifier as fit_classifier
