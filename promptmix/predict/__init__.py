"""What a run learned, put to use without its data set: predictions for any picture, weights and graphs for other programs."""

from promptmix.predict.predictor import Picture, Prediction, Predictor, forget_places, load, read_result

__all__ = ["Picture", "Prediction", "Predictor", "forget_places", "load", "read_result"]
