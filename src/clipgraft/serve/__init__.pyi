"""The public names of `clipgraft.serve`."""

from .args import ServiceArgs as ServiceArgs
from .args import WebArgs as WebArgs
from .messages import Classify as Classify
from .messages import Encode as Encode
from .messages import Picture as Picture
from .messages import Rank as Rank
from .messages import Search as Search
from .messages import Text as Text
from .messages import With as With
from .service import Service as Service
