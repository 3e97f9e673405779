"""Whole-volume prediction and embedding, and the way back to the grid of the input file."""

from medssl.inference.native import save_prediction, to_native
from medssl.inference.predict import embed_volumes, predict_volume

__all__ = ["embed_volumes", "predict_volume", "save_prediction", "to_native"]
