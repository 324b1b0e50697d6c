"""What a decode step of LTE does between its projections and its attention, in one launch."""

from pallas_kernels.lte_inputs.api import Convolution, lte_inputs_step

__all__ = ["Convolution", "lte_inputs_step"]
