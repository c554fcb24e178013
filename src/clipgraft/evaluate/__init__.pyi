"""The public names of `clipgraft.evaluate`."""

from .classification import class_features as class_features
from .classification import classification_metrics as classification_metrics
from .classification import evaluate_classification as evaluate_classification
from .error_analysis import RetrievalErrors as RetrievalErrors
from .error_analysis import retrieval_errors as retrieval_errors
from .metrics import Comparison as Comparison
from .metrics import Metrics as Metrics
from .retrieval import evaluate_retrieval as evaluate_retrieval
from .retrieval import retrieval_metrics as retrieval_metrics
