"""2:4 sparse operators for training, in plain PyTorch: masks, packing, unbiased gradient pruning, one autograd function.

Usable alone in any trainer; depends on torch only. `reference` says what each operator means; `autograd` holds the
2:4 linear layer.
"""
