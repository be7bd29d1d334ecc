"""Writes keys and values of new tokens into their pages, in place."""

from pallas_kernels.write_pages.api import BACKENDS as BACKENDS
from pallas_kernels.write_pages.api import choose as choose
from pallas_kernels.write_pages.api import write_pages as write_pages
