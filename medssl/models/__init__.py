"""Networks: encoders, decoders, heads, normalisation, and weights on disk."""

from medssl.models.cluster_heads import ClusterHeads
from medssl.models.decoders import Decoder, SegmentationNet, build_decoder
from medssl.models.encoders import ENCODERS, EncoderEntry, build_encoder
from medssl.models.heads import LinearHead, ProjectionHead, build_head
from medssl.models.initialise import seeded_init
from medssl.models.norm import SyncBatchNorm, make_norm
from medssl.models.weights import (
    LoadReport,
    clusters_from_weights,
    encoder_from_weights,
    head_from_weights,
    load_weights,
    read_model,
    save_weights,
)

__all__ = [
    "ENCODERS",
    "ClusterHeads",
    "Decoder",
    "EncoderEntry",
    "LinearHead",
    "LoadReport",
    "ProjectionHead",
    "SegmentationNet",
    "SyncBatchNorm",
    "build_decoder",
    "build_encoder",
    "build_head",
    "clusters_from_weights",
    "encoder_from_weights",
    "head_from_weights",
    "load_weights",
    "make_norm",
    "read_model",
    "save_weights",
    "seeded_init",
]
