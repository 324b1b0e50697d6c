"""The project's only glossary of dimension letters, and the array aliases made of them.

B  batch                     T  tokens of the input          U  keys, where they differ from the tokens
D  model width               F  inner width of the MLP       L  vocabulary
H  query heads (value heads in the gated delta rule)         K  key/value heads      G  = H / K, the group
N  head size of q and k      V  head size of v
W  window                    M  budget: slots retained per key/value head            Z  sinks
C  chunk or tile length      S  blocks                       R  layers
"""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Float32, Int32

Tokens = Int32[Array, "B T"]
SegmentIds = Int32[Array, "B T"]
Positions = Int32[Array, "B T"]
Hidden = Float[Array, "B T D"]
Queries = Float[Array, "B T H N"]
Keys = Float[Array, "B U K N"]
Values = Float[Array, "B U K V"]
Scores = Float32[Array, "B T K"]
Selected = Bool[Array, "B T K"]
