"""LTE's router: dilated convolutions over keys and values that give each token and KV head one score."""

from pallas_kernels.router.api import Convolution, router_scores
from pallas_kernels.router.dropout import Dropout, draw_seeds

__all__ = ["Convolution", "Dropout", "draw_seeds", "router_scores"]
