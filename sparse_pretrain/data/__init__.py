"""A batch's way: corpus -> tokenizer -> packed token store -> stateless sampler -> Lightning loaders."""
