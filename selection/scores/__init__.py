"""The scores: tensors in, tensors out."""
