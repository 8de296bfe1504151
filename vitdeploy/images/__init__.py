"""From an image file to the pixels that a model reads."""
