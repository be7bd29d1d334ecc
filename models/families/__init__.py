"""Architectures: each file turns the `config.json` of one family into a `DecoderConfig`."""
