"""Turns complete exact pages into pages of codes, in place."""

from pallas_kernels.quantize_pages.api import BACKENDS as BACKENDS
from pallas_kernels.quantize_pages.api import choose as choose
from pallas_kernels.quantize_pages.api import quantize_pages as quantize_pages
