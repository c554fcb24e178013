"""The public names of `clipgraft.models`."""

from .clip import Clip as Clip
from .meta import clip_on_meta as clip_on_meta
from .sites import Site as Site
