"""The public names of `clipgraft.lora`."""

from .combine import Combination as Combination
from .combine import combine_adapters as combine_adapters
from .config import LoraConfig as LoraConfig
from .control import disable_lora as disable_lora
from .control import enable_lora as enable_lora
from .control import lora_disabled as lora_disabled
from .control import merge_lora as merge_lora
from .control import set_adapter as set_adapter
from .control import unmerge_lora as unmerge_lora
from .initialization import start_from_data as start_from_data
from .inject import apply_lora as apply_lora
from .inject import remove_lora as remove_lora
from .state import count_parameters as count_parameters
from .state import verify_gradients as verify_gradients
