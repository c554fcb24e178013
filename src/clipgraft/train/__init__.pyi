"""The public names of `clipgraft.train`; `fit`, `fit_classifier` and `distill` are flat."""

from .args import DistillArgs as DistillArgs
from .args import HeadArgs as HeadArgs
from .run import FitResult as FitResult
