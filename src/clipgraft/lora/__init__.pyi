"""The public names of `clipgraft.lora`."""

from .combine import Combination as Combination
from .combine import combine_adapters as combine_adapters
from .counting import count_parameters as count_parameters
from .counting import verify_gradients as verify_gradients
from .inject import apply_lora as apply_lora
from .inject import remove_lora as remove_lora
from .merge import merge_lora as merge_lora
from .merge import unmerge_lora as unmerge_lora
from .starts import start_from_data as start_from_data
from .switch import disable_lora as disable_lora
from .switch import enable_lora as enable_lora
from .switch import lora_disabled as lora_disabled
from .switch import set_adapter as set_adapter
