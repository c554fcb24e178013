"""The public names of `clipgraft.models`."""

from .clip import Clip as Clip
from .dual_encoder import DualEncoder as DualEncoder
from .dual_encoder import FeatureTable as FeatureTable
from .dual_encoder import OwnTowers as OwnTowers
from .meta import clip_on_meta as clip_on_meta
from .sites import Site as Site
