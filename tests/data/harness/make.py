"""Writes what the harness's own Hugging Face adapter answers with a tiny Llama on the CPU: weights, tokenizer, answers.

Run anew only where requests are added: pip install torch transformers lm-eval==0.4.13, then python make.py. The files
here were made with lm-eval 0.4.13, transformers 5.17.0, torch 2.13.0, float32. The folder is of the format of
flash-linear-attention's transformer, so that ours reads it as any other.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
LENGTH = 48
TEXT = "the quick brown fox jumps over the lazy dog, and then it goes home to sleep for a very long time. "
ASKED = {
    "loglikelihood": [
        ("the cat", " sat"),
        ("trailing spaces  ", "here"),
        ("", "no context"),
        ("no space", "between"),
        (TEXT, "cut at the left"),
        (TEXT * 2, " and cut, too"),
        ("same", " length"),
        ("SAME", " LENGTH"),
        ("é ü", " ß"),
    ],
    "loglikelihood_rolling": [("short",), (TEXT,), (TEXT * 3,)],
    "generate_until": [
        ("the cat", {"until": ["\n"], "max_gen_toks": 12}),
        ("another one", {"until": ["e", "zz"], "max_gen_toks": 20}),
        ("no stop", {"until": [], "max_gen_toks": 16}),
        (TEXT, {"until": ["\n"], "max_gen_toks": 12}),
        (TEXT * 2, {"until": "\n\n", "max_gen_toks": 30}),
        ("a", {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}),
        ("default length", {"until": ["qq"]}),
        *((f"row {n}", {"until": ["\n"], "max_gen_toks": 24}) for n in range(6)),
    ],
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and a beginning and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*alphabet, "<s>", "</s>"])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=False,
            bos_token_id=256, eos_token_id=257,
        )
    )  # fmt: skip
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.1 if "norm" in name else 0.3)
    with torch.no_grad():  # ties: every odd id is as likely as the even one before it; the end token has a chance
        model.lm_head.weight[1:256:2] = model.lm_head.weight[0:256:2]
        model.lm_head.weight[257] *= 1.5
    return model.eval()


def theirs(name: str) -> str:
    """A Llama weight's name in the folder."""
    changes = (("model.embed_tokens", "model.embeddings"), ("self_attn", "attn"), ("input_layernorm", "attn_norm"))
    for old, new in (*changes, ("post_attention_layernorm", "mlp_norm")):
        name = name.replace(old, new)
    return name


def first(model: LlamaForCausalLM, text: PreTrainedTokenizerFast, context: str) -> str:
    """The likeliest next token: of two that are equally likely, the one with the smaller id."""
    token = int(model(torch.tensor([text.encode(context)])).logits[0, -1].argmax())
    found = text.decode([token])
    return found if token < 256 and found.isascii() else "\0"


def main() -> None:
    model, text = llama(), tokenizer()
    save_file({theirs(n): w.detach().contiguous() for n, w in model.named_parameters()}, HERE / "model.safetensors")
    config = dict(
        model_type="transformer", hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_heads=2,
        num_kv_heads=1, vocab_size=260, max_position_embeddings=128, norm_eps=1e-6, tie_word_embeddings=False,
        rope_theta=10000.0, bos_token_id=256, eos_token_id=257, hidden_act="swish",
    )  # fmt: skip
    (HERE / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        text.save_pretrained(folder)
        (HERE / "tokenizer.json").write_bytes((Path(folder) / "tokenizer.json").read_bytes())
    (HERE / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}) + "\n")
    answers = {}
    asked = [context for context in map("context {}".format, range(60)) if first(model, text, context).isprintable()]
    ASKED["loglikelihood"] += [(context, first(model, text, context)) for context in asked[:4]]
    for add_bos in (True, False):
        adapter = HFLM(
            pretrained=model, tokenizer=text, max_length=LENGTH, batch_size=4, add_bos_token=add_bos, device="cpu"
        )
        adapter._max_length = LENGTH
        for kind, requests in ASKED.items():
            if kind == "generate_until":  # as the harness hands them over: its defaults filled in, copies of its own
                requests = [(context, json.loads(json.dumps(options))) for context, options in requests]
            asked = [Instance(kind, {}, arguments, index) for index, arguments in enumerate(requests)]
            if kind == "generate_until":  # 256 new tokens, the default, leave no room here
                adapter_default = HFLM.max_gen_toks
                HFLM.max_gen_toks = 16
            answers[f"{kind}, add_bos={add_bos}"] = getattr(adapter, kind)(asked)
            if kind == "generate_until":
                HFLM.max_gen_toks = adapter_default
    document = {"max_length": LENGTH, "max_gen_toks": 16, "requests": ASKED, "answers": answers}
    (HERE / "answers.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
