"""Attention of the newest tokens over one segment of a paged KV cache."""

from pallas_kernels.paged_attention.api import BACKENDS as BACKENDS
from pallas_kernels.paged_attention.api import choose as choose
from pallas_kernels.paged_attention.api import paged_attention as paged_attention
