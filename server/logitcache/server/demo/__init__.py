"""A demonstration on handwritten digits: what distillation costs with a live teacher and with cached labels."""
