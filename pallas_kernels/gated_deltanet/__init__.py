"""One token of a Gated DeltaNet layer, from its projections to what its output projection takes."""

from pallas_kernels.gated_deltanet.api import Parameters, Projections, State, gated_deltanet_step

__all__ = ["Parameters", "Projections", "State", "gated_deltanet_step"]
