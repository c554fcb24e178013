"""The public names of `clipgraft.adapters`."""

from .formats import read_any as read_any
from .formats import write_any as write_any
from .guide import apply_lora_to_text_encoder as apply_lora_to_text_encoder
from .guide import get_lora_state_dict as get_lora_state_dict
from .guide import load_lora_adapters as load_lora_adapters
from .guide import save_lora_adapters as save_lora_adapters
from .loading import load_adapter as load_adapter
from .native import lora_state_dict as lora_state_dict
from .native import read_adapter as read_adapter
from .native import save_adapter as save_adapter
