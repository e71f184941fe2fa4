"""The options of data: one dataclass a task, chosen by `data.task`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparse_pretrain.schema import Family


@dataclass(kw_only=True)
class DataConfig(Family):
    """What every data set has."""

    name: str
    task: str
    num_workers: int = 2  # processes that load batches

    @property
    def tokens_per_example(self) -> int:
        """Of a text with its padding; an image counts as one."""
        return 1


@dataclass(kw_only=True)
class TextConfig(DataConfig):
    """A corpus, its tokenizer, and how sequences are cut from it: for decoders and encoders in pre-training."""

    task: str = "language_modeling"
    source: str
    train: list[str] = field(default_factory=list)  # text: files, folders or globs
    validation: list[str] = field(default_factory=list)  # text: the same; empty = held out from train
    validation_share: float = 0.05  # of the documents, where there is no validation split
    hf_path: str | None = None
    hf_config: str | None = None
    hf_train_split: str = "train"
    hf_validation_split: str | None = None  # null = held out from train
    hf_text_column: str = "text"
    hf_streaming: bool = False
    max_documents: int | None = None
    tokenizer: str = "bpe"  # train one on the corpus (bpe, wordpiece), or a path: see docs/data.md
    vocab_size: int = 32768  # of the tokenizer to train
    seq_len: int = 1024

    @property
    def tokens_per_example(self) -> int:
        return self.seq_len


@dataclass(kw_only=True)
class ExamplesConfig(DataConfig):
    """Examples with what they become or are: from files, or where `train` names none from a Hugging Face data set."""

    train: list[str] = field(default_factory=list)  # files or globs, in the forms that docs/data.md lists
    validation: list[str] = field(default_factory=list)  # the same; empty = held out from train
    validation_share: float = 0.05  # of the examples, where there is no validation split
    hf_path: str | None = None
    hf_config: str | None = None
    hf_revision: str | None = None  # a branch or commit; refs/convert/parquet = the Hub's own copy as data files
    hf_train_split: str = "train"
    hf_validation_split: str | None = None  # null = held out from train
    max_examples: int | None = None  # of each split


@dataclass(kw_only=True)
class PairsConfig(ExamplesConfig):
    """A text and what it becomes: translation, or generation from a description."""

    task: str = "text_to_text"
    format: str = "lines"  # of the files: lines of two files side by side, csv, jsonl, wikisql
    source_column: str = "source"  # csv, jsonl and Hugging Face; a dot reaches into a column: translation.en
    target_column: str = "target"
    tokenizer: str | None = "bpe"  # train one on both sides (bpe, wordpiece), or a path; null = the checkpoint's
    vocab_size: int = 32768  # of the tokenizer to train
    max_source_len: int = 128  # tokens, with those that frame a text; longer texts are cut
    max_target_len: int = 128
    label_smoothing: float = 0.0

    @property
    def tokens_per_example(self) -> int:
        return self.max_source_len + self.max_target_len


@dataclass(kw_only=True)
class ImagesConfig(ExamplesConfig):
    """Images and their classes."""

    task: str = "image_classification"
    image_column: str = "image"  # of a Hugging Face data set
    label_column: str = "label"
    image_size: int = 224
    channels: int = 3  # 1 or 3
    flip: bool = True  # left to right, half of the images
    crop_padding: int = 0  # pixels around an image before a random crop of its size
    mixup: float = 0.0  # alpha of the Beta distribution; 0 = off
    cutmix: float = 0.0
    label_smoothing: float = 0.0


@dataclass(kw_only=True)
class SentencesConfig(ExamplesConfig):
    """Sentences, or pairs of them, and their classes or scores: GLUE's tasks."""

    task: str = "text_classification"
    glue_task: str = "sst2"
    tokenizer: str | None = None  # a path; null = the checkpoint's
    seq_len: int = 128  # tokens; longer texts are cut

    @property
    def tokens_per_example(self) -> int:
        return self.seq_len


@dataclass(kw_only=True)
class QuestionsConfig(ExamplesConfig):
    """Questions whose answers are spans of a context: SQuAD v1.1."""

    task: str = "question_answering"
    tokenizer: str | None = None  # a path; null = the checkpoint's
    seq_len: int = 384
    stride: int = 128  # tokens shared by two windows over a long context
    max_query_len: int = 64  # tokens; longer questions are cut

    @property
    def tokens_per_example(self) -> int:
        return self.seq_len


DataConfig.family_option = "task"
DataConfig.families = {
    "language_modeling": TextConfig,
    "text_to_text": PairsConfig,
    "image_classification": ImagesConfig,
    "text_classification": SentencesConfig,
    "question_answering": QuestionsConfig,
}
