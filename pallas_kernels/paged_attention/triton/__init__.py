"""Paged attention on NVIDIA GPUs, in Pallas's Triton language.

From the outside in: `backend` says what is served and calls `call`, for a prompt's chunk by way of
`chunks`. `call` shares out the work (`work_list`), rotates queries, launches `kernel`, and merges
the parts (`merge`). `kernel` goes through its share block by block: `span` and `blocks` say which
tokens, `address` where they are, `readers` turn their words into operands of a dot (`levels` the
arithmetic, `ptx` its text), `softmax` attends. `means` adds scores of page means; `tiles` are the
measured sizes.
"""

from pallas_kernels.paged_attention.triton.backend import paged_attention as paged_attention
from pallas_kernels.paged_attention.triton.backend import refusal as refusal
