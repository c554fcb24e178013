"""The public names of `clipgraft.report`."""

from .args import PushArgs as PushArgs
from .publish import Pushed as Pushed
from .publish import push as push
