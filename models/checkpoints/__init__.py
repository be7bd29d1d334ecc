"""Published weights: readers of the file formats, and the step from their tensors to a `Decoder`.

`open.py` picks a reader; nothing is read before it is asked for. `load_decoder.py` fills a model.
"""
