"""The public names of `clipgraft.data`."""

from .args import FeatureArgs as FeatureArgs
from .args import LabelArgs as LabelArgs
from .args import TableArgs as TableArgs
from .contact_sheet import write_contact_sheet as write_contact_sheet
from .datasets import Labelled as Labelled
from .datasets import Pairs as Pairs
from .datasets import few_shot as few_shot
from .datasets import split_labelled as split_labelled
from .examine import caption_lengths as caption_lengths
from .examine import near_duplicates as near_duplicates
from .examine import oddest_pairs as oddest_pairs
from .feature_cache import FeatureCache as FeatureCache
from .prompts import WeightedPrompts as WeightedPrompts
from .prompts import class_prompts as class_prompts
from .prompts import read_prompts as read_prompts
from .prompts import write_prompts as write_prompts
from .reader import read_labelled as read_labelled
from .reader import read_pairs as read_pairs
from .reader import read_texts as read_texts
from .retained import Retained as Retained
from .retained import read_retained as read_retained
from .retained import retained_texts as retained_texts
from .splitting import split_pairs as split_pairs
from .splitting import write_parts as write_parts
