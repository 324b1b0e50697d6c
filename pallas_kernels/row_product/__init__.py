"""The product of few rows with a weight: what a decode step spends most of its launches and weights on."""

from pallas_kernels.row_product.api import row_product

__all__ = ["row_product"]
