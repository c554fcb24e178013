"""The public names of `clipgraft.evaluate`."""

from .classify import classification_metrics as classification_metrics
from .classify import evaluate_classification as evaluate_classification
from .metrics import retrieval_metrics as retrieval_metrics
from .retrieval import evaluate_retrieval as evaluate_retrieval
