"""A small text encoder for a closed vocabulary: a word tokenizer and a random, frozen UMT5 encoder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

SPECIAL = ("<pad>", "</s>", "<unk>")


def save_text_encoder(
    pipeline: Path, prompts: Iterable[str], dim: int, max_length: int, seed: int = 0, heads: int = 2
) -> None:
    """Writes `tokenizer/` and `text_encoder/` of a pipeline.

    The encoder is not trained: where the reference image shows what the prompt says, it only has to tell prompts apart.

    Args:
        pipeline: its folder.
        prompts: texts whose words and punctuation marks make the vocabulary.
        dim: width D of the embeddings.
        max_length: tokens L of a prompt; longer ones are cut.
        seed: of the weights.
        heads: of the one attention layer; `dim` must be a multiple.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    split = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    words = sorted({word for prompt in prompts for word, _ in split.pre_tokenize_str(prompt)})
    pad, end, unknown = SPECIAL
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token=unknown, model_max_length=max_length
    ).save_pretrained(pipeline / "tokenizer")
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=len(vocabulary),
        d_model=dim,
        d_kv=dim // heads,
        d_ff=2 * dim,
        num_layers=1,
        num_heads=heads,
        dropout_rate=0.0,
    )
    UMT5EncoderModel(config).save_pretrained(pipeline / "text_encoder")
