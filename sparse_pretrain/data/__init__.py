"""A batch's way: source -> tokenizer -> store (prepared once, memory-mapped) -> stateless sampler -> Lightning loaders.

Everything outside uses `sparse_pretrain.data.build`:

    Store = TokenStore | ExampleStore
    prepare(cfg: DataConfig) -> Store
    open_store(folder: Path) -> Store          # a prepared one, as `store.folder`
    data_module(
        cfg: DataConfig, store: Store, *,
        batch_size: int, seed: int, total_steps: int, eval_batches: int,
        start_step: Callable[[], int] | None = None,
        objective: str = "causal",                                 # causal | masked | seq2seq
        mask_share: float = 0.15, whole_words: bool = True,        # masked
    ) -> StepDataModule

A store has `folder`, `manifest["name"]`, `digest`, `vocab_size` and `tokenizer_path` (None for images). An ExampleStore
also has `num_examples(split)`, `num_classes` (None where there are none; 1 for a score), `label_names` and
`column(split, name)`; what its manifest and columns hold is said where they are made (`pairs`, `images`, `sentences`,
`questions`).

A StepDataModule has `train_dataloader()` and `val_dataloader()` (StepLoaders; rank and device are the trainer's),
`validation_loader(rank=0, world_size=1)` (without a trainer), `sampler.rank_indices(step, rank, world_size)` and
`sampler.num_sequences`, of an epoch. Which batches come out is in `sparse_pretrain.data.batches`.
"""
