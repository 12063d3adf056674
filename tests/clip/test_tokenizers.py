"""Tokenizers of Hugging Face, made here from small vocabularies: what we put together is what open_clip's wrapper writes."""

from __future__ import annotations

import pytest
import torch

from promptmix.clip.tokens import PretrainedTokenizer

transformers = pytest.importorskip("transformers", reason="needs transformers (the extra hf)")

WORDS = ["a", "photo", "of", "dog", "sea", "lion", "straßenbahn", "собака", "狗", "crème", "brûlée", "type", "animal"]
TEXTS = ["a photo of a dog.", "a photo of a sea lion, a type of animal.", "собака", "a 狗"]


def bert():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", ",", *WORDS])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(strip_accents=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names), {"strip_sep_token": True}


def unigram(pad: str, front: str):
    """SigLIP's (no token in front, </s> behind, padded with </s> or <pad>), or with <s> in front as XLM's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = [
        "<pad>",
        "</s>",
        "<s>",
        "<unk>",
        ".",
        ",",
        *(f"▁{word}" for word in WORDS),
        *WORDS,
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    made = Tokenizer(models.Unigram([(piece, -1.0 - 0.1 * (len(piece) < 2)) for piece in pieces], unk_id=3))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single=f"{front} $A </s>".strip(), special_tokens=[("<s>", 2), ("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token=pad, unk_token="<unk>", eos_token="</s>"), {}


@pytest.mark.parametrize("clean", ["canonicalize", "whitespace"])
@pytest.mark.parametrize(
    "make", [bert, lambda: unigram("</s>", ""), lambda: unigram("<pad>", ""), lambda: unigram("<pad>", "<s>")]
)
def test_rows_are_open_clips(make, clean, tmp_path):
    from open_clip.tokenizer import HFTokenizer

    inner, options = make()
    inner.save_pretrained(tmp_path)
    source = HFTokenizer(str(tmp_path), context_length=20, clean=clean, **options)
    ours = PretrainedTokenizer(source)
    for text, row in zip(TEXTS, source(TEXTS), strict=True):
        ids = [*ours.before, *ours.encode(text), *ours.after]
        assert torch.equal(torch.tensor(ids + [ours.pad] * (20 - len(ids))), row)
    whole = ours.encode("a photo of a dog.")
    assert ours.encode("a photo of a") + ours.encode("dog") + ours.encode(".") == whole
    assert ours.encode("") == () and (len(ours.encode(".")) == 1) == (clean == "whitespace")
