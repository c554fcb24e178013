"""The public names of `clipgraft.data`."""

from .feature_cache import FeatureCache as FeatureCache
from .labels import Labelled as Labelled
from .labels import few_shot as few_shot
from .labels import split_labelled as split_labelled
from .labels_read import read_labelled as read_labelled
from .pairs import Pairs as Pairs
from .pairs import read_pairs as read_pairs
from .prompts import class_prompts as class_prompts
from .prompts import read_prompts as read_prompts
from .texts import read_texts as read_texts
