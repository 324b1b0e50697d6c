"""Does the adapter answer as the harness's own Hugging Face adapter does: truncation, stop strings, ties, numbers?

The answers in tests/data/harness were recorded from it, with a tiny Llama of the same weights (``make.py`` there).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.evaluations import texts
from lte_jax import restore

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install -e '.[eval]'"
    ),
    # Libraries that the harness brings: sqlite and dill handles, deprecated names.
    pytest.mark.filterwarnings("default"),
]
FOLDER = Path(__file__).parents[1] / "data/harness"
RECORD = json.loads((FOLDER / "answers.json").read_text())


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("batch_size", [4, 1])
def test_answers_are_those_of_the_harness_adapter(add_bos, batch_size):
    from lm_eval.api.instance import Instance

    from lte_jax.evaluate.harness import HarnessModel

    model, tokenizer = restore.load_model(FOLDER)
    adapter = HarnessModel(
        model,
        tokenizer,
        texts,
        max_length=RECORD["max_length"],
        max_gen_toks=RECORD["max_gen_toks"],
        batch_size=batch_size,
        add_bos_token=add_bos,
    )
    for kind, requests in RECORD["requests"].items():
        instances = [Instance(kind, {}, tuple(arguments), index) for index, arguments in enumerate(requests)]
        ours = getattr(adapter, kind)(instances, disable_tqdm=True)
        theirs = RECORD["answers"][f"{kind}, add_bos={add_bos}"]
        if kind == "generate_until":
            assert ours == theirs
        elif kind == "loglikelihood":
            np.testing.assert_allclose([value for value, _ in ours], [value for value, _ in theirs], atol=1e-4, rtol=0)
            assert [bool(greedy) for _, greedy in ours] == [greedy for _, greedy in theirs]
        else:
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    # Of eight requests of each adapter some are cut: these four by the context alone.
    assert adapter.truncated >= 4
