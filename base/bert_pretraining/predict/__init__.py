"""What a checkpoint has learned: words for each [MASK], and whether a sentence follows another."""

from bert_pretraining.predict.loading import Sources, load
from bert_pretraining.predict.predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor", "Sources", "load"]
