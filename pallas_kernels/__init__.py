"""Attention and cache-writing kernels: one folder per op, each with a plain-JAX twin.

The ops are functions of this package, though folders of the same names hold their backends:
`from pallas_kernels import paged_attention` is the function.
"""

from pallas_kernels.decode_attention import decode_attention as decode_attention
from pallas_kernels.paged_attention import paged_attention as paged_attention
from pallas_kernels.pages import Pages as Pages
from pallas_kernels.pages import empty_pages as empty_pages
from pallas_kernels.quantize_pages import quantize_pages as quantize_pages
from pallas_kernels.rule import PageLag as PageLag
from pallas_kernels.rule import Rule as Rule
from pallas_kernels.segment import Part as Part
from pallas_kernels.segment import Queries as Queries
from pallas_kernels.segment import Segment as Segment
from pallas_kernels.segment import add_learned_sink as add_learned_sink
from pallas_kernels.segment import merge as merge
from pallas_kernels.write_pages import write_pages as write_pages
