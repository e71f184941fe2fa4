"""2:4 sparse operators for training, in plain PyTorch, usable alone in any trainer.

`reference` says what each operator means: masks, packing, unbiased pruning of gradients. `autograd` holds the
2:4 linear layer.
"""
