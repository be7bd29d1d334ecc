"""Codecs: what a token's key and value become when they are stored in few bits."""
