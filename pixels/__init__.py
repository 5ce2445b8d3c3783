"""From a file to pixels: decoding what strangers send, colours, masks. images.py is its door."""
