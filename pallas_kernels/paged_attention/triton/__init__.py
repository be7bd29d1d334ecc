"""Paged attention on NVIDIA GPUs, in Pallas's Triton language.

From the outside in: `backend` says which calls are served and passes them to `call`; a prompt's
chunk goes through `chunks` first. `call` shares out the work (`work_list`), rotates queries,
launches `kernel`, and merges the parts (`merge`). Each program of `kernel` goes through its share
block by block: `span` and `blocks` say which tokens it attends, `address` where they are, `readers`
turn their words into operands of a dot (`levels` has the arithmetic, `ptx` its PTX), and `softmax`
attends. `means` computes the scores of page means; `tile_sizes` holds the measured tile sizes.
"""

from pallas_kernels.paged_attention.triton.backend import paged_attention as paged_attention
from pallas_kernels.paged_attention.triton.backend import refusal as refusal
