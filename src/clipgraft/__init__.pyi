"""The public names of clipgraft, in one list: type checkers read it, and at run time `lazy_loader` does."""

from . import adapters as adapters
from . import compact as compact
from . import data as data
from . import emoji as emoji
from . import errors as errors
from . import evaluate as evaluate
from . import lora as lora
from . import models as models
from . import profile as profile
from . import search as search
from . import train as train
from .adapters.adapter_file import read_adapter as read_adapter
from .adapters.adapter_file import save_adapter as save_adapter
from .adapters.attach import load_adapter as load_adapter
from .adapters.clip import Clip as Clip
from .adapters.clip import apply_lora_to_text_encoder as apply_lora_to_text_encoder
from .adapters.clip import get_lora_state_dict as get_lora_state_dict
from .adapters.clip import load_lora_adapters as load_lora_adapters
from .adapters.clip import save_lora_adapters as save_lora_adapters
from .adapters.open import load as load
from .data.args import FeatureArgs as FeatureArgs
from .data.datasets import Labelled as Labelled
from .data.datasets import Pairs as Pairs
from .data.reader import read_labelled as read_labelled
from .data.reader import read_pairs as read_pairs
from .errors import ClipgraftError as ClipgraftError
from .evaluate.classification import evaluate_classification as evaluate_classification
from .evaluate.retrieval import evaluate_retrieval as evaluate_retrieval
from .lora.combine import combine_adapters as combine_adapters
from .lora.control import disable_lora as disable_lora
from .lora.control import enable_lora as enable_lora
from .lora.control import lora_disabled as lora_disabled
from .lora.control import set_adapter as set_adapter
from .lora.inject import apply_lora as apply_lora
from .lora.inject import remove_lora as remove_lora
from .lora.merge import merge_lora as merge_lora
from .lora.merge import unmerge_lora as unmerge_lora
from .lora.parameters import count_parameters as count_parameters
from .search.args import EncodeArgs as EncodeArgs
from .train.args import RunArgs as RunArgs
from .train.args import TrainArgs as TrainArgs
from .train.fit import distill as distill
from .train.fit import fit as fit
from .train.fit import fit_classifier as fit_classifier

__version__: str
