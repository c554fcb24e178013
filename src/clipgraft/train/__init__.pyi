"""The public names of `clipgraft.train`; the functions that train are flat."""

from .args import DistillArgs as DistillArgs
from .args import HeadArgs as HeadArgs
from .args import TranslateArgs as TranslateArgs
from .fewshot.args import FeatureModeArgs as FeatureModeArgs
from .fewshot.args import FewShotArgs as FewShotArgs
from .fewshot.compare import FewShotData as FewShotData
from .fewshot.compare import compare_few_shot as compare_few_shot
from .fewshot.features import FewShotFeatures as FewShotFeatures
from .fewshot.features import few_shot_features as few_shot_features
from .fewshot.features import tower_features as tower_features
from .fewshot.modes import FEATURE_MODES as FEATURE_MODES
from .fewshot.prolip import attach_projection as attach_projection
from .fewshot.prompt_weights import PromptEnsemble as PromptEnsemble
from .fewshot.prompt_weights import learn_prompt_weights as learn_prompt_weights
from .fewshot.results import FewShotComparison as FewShotComparison
from .run import FitResult as FitResult
