"""The public names of `clipgraft.adapters`."""

from .attach import load_adapter as load_adapter
from .convert import read_any as read_any
from .convert import write_any as write_any
from .folder import lora_state_dict as lora_state_dict
from .folder import read_adapter as read_adapter
from .folder import save_adapter as save_adapter
from .open import apply_lora_to_text_encoder as apply_lora_to_text_encoder
from .open import get_lora_state_dict as get_lora_state_dict
from .open import load_lora_adapters as load_lora_adapters
from .open import save_lora_adapters as save_lora_adapters
