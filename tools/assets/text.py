"""tiny-en's text tower: the cut tokenizer, and training towards the image prototypes of the concepts."""

from __future__ import annotations

import gzip
import math
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F

from assets.captions import Captions
from assets.concepts import load_concepts
from assets.towers import BPE_FILE, CONTEXT_LENGTH, SCALE, VOCAB_SIZE, build

STEPS = 1600
BATCH = 192
LEARNING_RATE = 1.5e-3
WEIGHT_DECAY = 0.1
SAVE_EVERY = 400
SEED = 1


def cut_tokenizer(work: Path) -> None:
    """Write the first merges of CLIP's byte pair encoding, as many as fit ``VOCAB_SIZE`` with bytes and two marks.

    open_clip's tokenizer splits the file at newlines, drops the first line and takes the rest as merges, so
    the cut file ends without a newline: one more empty merge would shift the two marks.
    """
    source = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(source.read_bytes()).decode("utf-8").split("\n")
    cut = "\n".join(lines[: 1 + VOCAB_SIZE - 2 * 256 - 2])
    (work / BPE_FILE).write_bytes(gzip.compress(cut.encode("utf-8"), 9, mtime=0))


def tokenizer(work: Path) -> open_clip.SimpleTokenizer:
    """Return the cut tokenizer."""
    return open_clip.SimpleTokenizer(bpe_path=str(work / BPE_FILE), context_length=CONTEXT_LENGTH)


def is_text_key(key: str) -> bool:
    """Tell whether a key of CLIP's state dict belongs to the part that both models share."""
    return not key.startswith("visual.")


def trim(tokens: torch.Tensor) -> torch.Tensor:
    """Cut columns behind the batch's last end mark: causal attention never looks there."""
    return tokens[:, : int(tokens.argmax(1).max()) + 1]


def encode_text(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return normalised text features (N, D) of trimmed tokens (N, L) by open_clip's own modules."""
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)[torch.arange(len(tokens)), tokens.argmax(1)]
    return F.normalize(x @ model.text_projection, dim=-1)


def train_text_tower(work: Path, steps: int = STEPS) -> None:
    """Train the text tower on captions and write ``tiny-text.pt`` (float16)."""
    torch.manual_seed(SEED)
    model = build("tiny-en")
    model.logit_scale.requires_grad_(False)
    parameters = [p for key, p in model.named_parameters() if is_text_key(key) and p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
    )
    warmup = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1, i / steps)))
    )
    targets = torch.load(work / "prototypes.pt", weights_only=True)
    captions = Captions([concept for concept in load_concepts(work) if not concept.novel], SEED)
    tokenize, start = tokenizer(work), time.time()
    for step in range(steps):
        texts, wanted = captions.batch(BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            features = encode_text(model, trim(tokenize(texts)))
        loss = F.cross_entropy(SCALE * features.float() @ targets.T, wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"text step {step} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            _save(model, work)


def _save(model: torch.nn.Module, work: Path) -> None:
    state = {key: value.half() for key, value in model.state_dict().items() if is_text_key(key)}
    torch.save(state, work / "tiny-text.pt")
