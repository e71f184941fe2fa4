"""Transformers of plain `nn.Linear` layers: a model never knows that it is sparse."""
