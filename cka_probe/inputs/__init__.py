"""Data to paired batches: decoding, image sources, views of the same images."""
