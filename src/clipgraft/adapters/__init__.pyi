"""The public names of `clipgraft.adapters`."""

from .adapter_file import lora_state_dict as lora_state_dict
from .adapter_file import read_adapter as read_adapter
from .adapter_file import save_adapter as save_adapter
from .attach import load_adapter as load_adapter
from .clip import apply_lora_to_text_encoder as apply_lora_to_text_encoder
from .clip import get_lora_state_dict as get_lora_state_dict
from .clip import load_lora_adapters as load_lora_adapters
from .clip import save_lora_adapters as save_lora_adapters
from .convert import read_any as read_any
from .convert import write_any as write_any
