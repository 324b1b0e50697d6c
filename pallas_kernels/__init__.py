"""Operations on arrays, a folder each, in up to three implementations: ``xla``, ``triton``, ``pallas`` (Mosaic GPU).

Training, prompts and decoding
  gated_delta_rule: chunks of a sequence at once, and one token
  window_attention: causal windows, with keys that are retained beyond them; caches of slots
  block_attention: native sparse attention
  short_convolution: causal taps with SiLU
  rms_norm: gated, and of the residual stream
  router: LTE's scores
  cross_entropy: with its gradient in the same call

One token of every row
  gated_deltanet: all of that layer between its projections
  lte_inputs: what LTE computes before it attends
  row_product: a product with norm, bias, gate and residual in one launch

In every folder ``api.py`` has the equation, the checks and what a backend provides; ``xla.py`` is the reference, and
``triton*.py`` and ``pallas*.py`` are kernels: body, launch, choice of tiles, ``check``.

Shared by the folders
  dispatch, arguments: who runs a call, and what is refused
  batching, documents, tiles: vmap, packed rows, tile sizes
  triton_call, triton_launch, triton_programs: from a Triton kernel to an instruction of JAX's program, kept on disk
  triton_interpreter, triton_math: kernels on a CPU; functions that kernels share
  visible_gpus: the GPUs of a process, before JAX is there
"""
