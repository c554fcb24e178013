"""The public names of `clipgraft.profile`."""

from .forward import costs as costs
from .inspection import inspect as inspect
from .llava import LlavaTokens as LlavaTokens
from .llava import llava_costs as llava_costs
from .llava import llava_on_meta as llava_on_meta
from .tables import layer_table as layer_table
from .training import target_costs as target_costs
from .training import training_costs as training_costs
