"""2:4 sparse operators for training, usable alone in any trainer.

`reference` says in plain PyTorch what each operator means: masks, packing, unbiased pruning of gradients. `autograd`
holds the 2:4 linear layer. The Triton kernels are a file for each operator; `backends` multiply, and `dispatch`
measures which of them does it fastest. Imports without triton and without a GPU.
"""
