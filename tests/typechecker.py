"""Checks every call inside the model against its annotations, shapes included: ``pytest --check_shapes tests/mixers``.

The doors (the operations' ``api.py``, the model's methods) check their arguments themselves, at all times.
"""

from __future__ import annotations

import beartype

MODULES = (
    "lte_jax.mixers",
    "lte_jax.layers",
    "lte_jax.losses",
    "lte_jax.retention",
    "lte_jax.sampling",
    "lte_jax.dims",
)

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
