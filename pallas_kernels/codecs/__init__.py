"""Codecs: how a token's key and value are stored in few bits."""
