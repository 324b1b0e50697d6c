"""Does RULER, through the harness, make its samples with the project's tokenizers, and is nothing of them cut?"""

from __future__ import annotations

import importlib.util
import types

import pytest

from lte_jax.data.tokenizer import load_tokenizer
from tests.system.test_harness import build, cache, one_index, pytestmark  # noqa: F401 - fixtures and marks

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="pip install -e '.[eval]'"
)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "nltk", "wonderwords")),
    reason="RULER needs transformers, nltk and wonderwords: pip install -e '.[eval]'",
)
def test_ruler_makes_its_samples_with_the_models_own_tokenizer(monkeypatch):
    import wonderwords

    few = {kind: list(words)[:20] for kind, words in wonderwords.RandomWord()._categories.items()}
    # RULER sorts millions of pairs of words when it is imported.
    monkeypatch.setattr(wonderwords, "RandomWord", lambda: types.SimpleNamespace(_categories=few))
    from lm_eval.tasks.ruler import prepare_niah

    import lte_jax.evaluate.tasks as tasks

    asked, make = [], prepare_niah.generate_samples
    # It makes 500 samples of each length, of which two are asked.
    monkeypatch.setattr(prepare_niah, "generate_samples", lambda *args, **kw: make(*args, **kw | {"num_samples": 3}))

    def perfect(model, prompts, *, decode, max_new_tokens, **options):
        """A stand-in that reads the number off the prompt."""
        said = []
        for prompt in prompts:
            text = decode(prompt)
            asked.append(len(prompt))
            said.append(" " + text.split(" is: ")[1].split(".")[0] + ".")
        return said

    from lte_jax.evaluate.harness import HarnessModel

    adapter = HarnessModel(build(), load_tokenizer("bytes"), perfect, max_length=4096 + 128, batch_size=4)
    lengths = [1024, 2048, 4096]
    found = tasks.run_tasks(adapter, ["niah_single_1"], lengths=lengths, limit=2, seed=1, log_samples=True)
    numbers = found["results"]["niah_single_1"]
    assert {name: value for name, value in numbers.items() if name[0].isdigit() and "stderr" not in name} == {
        "1024,none": 1.0,
        "2048,none": 1.0,
        "4096,none": 1.0,
    }
    assert found["truncated"] == 0 and len(asked) == 6
    assert 2048 < max(asked[:2]) <= 4096 and max(asked[4:]) <= 1024  # sorted by length, longest first
    with pytest.raises(ValueError, match="--limit=0: it must be at least 1, or left out for all documents"):
        tasks.run_tasks(adapter, ["niah_single_1"], lengths=lengths, limit=0)
    docs = [sample["doc"]["input"] for sample in found["samples"]["niah_single_1"]]
    again = tasks.run_tasks(adapter, ["niah_single_1"], lengths=lengths, limit=2, seed=1, log_samples=True)
    assert [sample["doc"]["input"] for sample in again["samples"]["niah_single_1"]] == docs


@needs_transformers
def test_rulers_modules_find_our_tokenizers_however_they_are_loaded(tmp_path, monkeypatch):
    """The harness reads ``common_utils`` anew from its file for one task, and other tasks import what came of it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from lm_eval.tasks.ruler import common_utils
    from transformers import AutoTokenizer

    from lte_jax.evaluate.ruler import own_tokenizers

    method = vars(AutoTokenizer)["from_pretrained"]
    with own_tokenizers():
        again = importlib.util.spec_from_file_location("common_utils_again", common_utils.__file__)
        module = importlib.util.module_from_spec(again)
        again.loader.exec_module(module)
        for found in (common_utils, module):
            assert found.get_tokenizer("bytes")("héllo").input_ids == list("héllo".encode())
        with pytest.raises(OSError):
            module.get_tokenizer(str(tmp_path / "nowhere"))
    assert vars(AutoTokenizer)["from_pretrained"] is method


@needs_transformers
def test_variable_tracking_that_no_sample_fits_is_refused():
    """RULER itself would draw for ever."""
    from lte_jax.evaluate.ruler import check_variable_tracking

    words = types.SimpleNamespace(name="words", encode=str.split)
    check_variable_tracking(words, [1024, 4096])
    with pytest.raises(ValueError, match=r"its example has room for 500 tokens, and takes \d+ of .*'bytes'"):
        check_variable_tracking(load_tokenizer("bytes"), [4096])
    with pytest.raises(ValueError, match="a sample of length 256 has room for 256 tokens"):
        check_variable_tracking(words, [1024, 256])


def test_samples_that_ask_for_nothing_are_refused_before_they_are_answered():
    from lte_jax.evaluate.ruler import check_asked

    docs = [{"input": "x", "outputs": ["a"], "max_length": 4096}, {"goal": "no RULER"}]
    check_asked("ruler_cwe", docs)
    with pytest.raises(ValueError, match="ruler_cwe: its samples of length 1024 have no room"):
        check_asked("ruler_cwe", [*docs, {"input": "x", "outputs": [], "max_length": 1024}])
