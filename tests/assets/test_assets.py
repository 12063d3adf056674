"""The embedded models and packs: present, small, loadable, licensed, and good enough."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import promptmix.assets
from promptmix.assets import asset_path
from promptmix.errors import DataError

FOLDER = Path(promptmix.assets.__file__).parent
STYLES = ("openmoji_color", "openmoji_black", "fluent_3d", "fluent_high_contrast")
MODELS = ("tiny-en", "tiny-vit")
TEMPLATE = "a photo of a {}."


def read_json(name: str) -> dict:
    return json.loads(asset_path(name).read_text(encoding="utf-8"))


def tokenizer_of(description: dict) -> open_clip.SimpleTokenizer:
    cut = description["tokenizer"]
    return open_clip.SimpleTokenizer(bpe_path=str(asset_path(f"models/{cut['bpe']}")), context_length=cut["context_length"])


def load(name: str) -> tuple[torch.nn.Module, dict]:
    description = read_json(f"models/{name}.json")
    model = open_clip.CLIP(**description["model_cfg"])
    state = {}
    for file in description["weights"]:
        part = load_file(asset_path(f"models/{file}"))
        assert not set(part) & set(state)
        state.update(part)
    model.load_state_dict(state, strict=True)
    return model.eval(), description


def test_sizes():
    packs = sum(path.stat().st_size for path in FOLDER.glob("emoji/*.zip"))
    weights = sum(path.stat().st_size for path in FOLDER.glob("models/*"))
    assert packs < 8e6
    assert packs + weights < 24e6


@pytest.mark.parametrize("style", STYLES)
def test_pack_holds_every_concept_at_64_pixels(style):
    codes = {f"{row['hexcode']}.webp" for row in read_json("emoji/concepts.json")["concepts"]}
    with zipfile.ZipFile(asset_path(f"emoji/{style}.zip")) as pack:
        assert set(pack.namelist()) == codes
        assert {info.compress_type for info in pack.infolist()} == {zipfile.ZIP_STORED}
        assert {Image.open(io.BytesIO(pack.read(name))).size for name in sorted(codes)[::100]} == {(64, 64)}


def test_concepts_are_unique_and_some_are_novel_in_most_subgroups():
    rows = read_json("emoji/concepts.json")["concepts"]
    assert len({row["hexcode"] for row in rows}) == len({row["label"] for row in rows}) == len(rows)
    novel = [row for row in rows if row["novel"]]
    assert 0.11 < len(novel) / len(rows) < 0.13
    assert len({row["subgroup"] for row in novel}) > 0.6 * len({row["subgroup"] for row in rows})


def test_split_has_no_concept_twice_and_covers_every_family():
    split = read_json("emoji/families_split.json")
    rows = read_json("emoji/concepts.json")["concepts"]
    codes = [code for part in ("train", "val", "test") for members in split[part].values() for code in members]
    assert len(codes) == len(set(codes))
    family_of = {row["hexcode"]: row["family"] for row in rows}
    assert set(codes) == {code for code, family in family_of.items() if family}
    for part in ("train", "val", "test"):
        assert len(split[part]) == 41
        assert all(family_of[code] == family for family, members in split[part].items() for code in members)
    assert all(len(members) == 2 for members in split["val"].values())
    for family in split["train"]:
        assert abs(len(split["train"][family]) - len(split["test"][family])) <= 1


def test_tables_say_where_they_come_from():
    assert "emojibase" in read_json("emoji/concepts.json")["origin"]
    assert "tools/build_assets.py" in read_json("emoji/families_split.json")["origin"]


def test_licences_are_there_in_full():
    texts = {path.name: path.read_text(encoding="utf-8") for path in (FOLDER / "LICENSES").glob("*.txt")}
    assert {"Apache-2.0.txt", "CC-BY-4.0.txt", "CC-BY-SA-4.0.txt", "Unicode-3.0.txt"} <= set(texts)
    assert all(len(text) > 1000 for text in texts.values())
    notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
    for author in ("Google", "Twitter", "Microsoft", "Mozilla", "OpenMoji", "OpenAI", "EfficientNet-Lite"):
        assert author in notice
    for name in texts:
        assert name in notice


@pytest.mark.parametrize("name", MODELS)
def test_tokenizer_cut(name):
    description = read_json(f"models/{name}.json")
    tokenizer = tokenizer_of(description)
    assert tokenizer.vocab_size == description["model_cfg"]["text_cfg"]["vocab_size"] == 8192
    assert (tokenizer.sot_token_id, tokenizer.eot_token_id) == (8190, 8191)
    assert "" not in tokenizer.encoder
    labels = [row["label"] for row in read_json("emoji/concepts.json")["concepts"]]
    tokens = tokenizer([TEMPLATE.format(label) for label in labels])
    # Every name comes back from its tokens, so none has an unknown part, and none is cut at the context's end.
    assert (tokens[:, -1] == 0).all()
    for label, row in zip(labels, tokens, strict=True):
        decoded = tokenizer.decode([token for token in row.tolist() if 0 < token < 8190])
        assert decoded.replace(" ", "") == open_clip.tokenizer.basic_clean(TEMPLATE.format(label)).lower().replace(" ", "")


@torch.inference_mode()
@pytest.mark.parametrize(("name", "floor"), [("tiny-en", 0.70), ("tiny-vit", 0.50)])
def test_zero_shot_over_every_eighth_seen_concept(name, floor):
    model, description = load(name)
    assert model.logit_scale.exp().item() == pytest.approx(20, rel=1e-3)
    rows = [row for row in read_json("emoji/concepts.json")["concepts"] if not row["novel"]][::8]
    with zipfile.ZipFile(asset_path("emoji/fluent_3d.zip")) as pack:
        pictures = [Image.open(io.BytesIO(pack.read(f"{row['hexcode']}.webp"))).convert("RGB") for row in rows]
    size = description["image_size"]
    resized = [picture.resize((size, size), Image.Resampling.BICUBIC) for picture in pictures]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in resized])).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(description[key])[:, None, None] for key in ("mean", "std"))
    images = F.normalize(model.visual((pixels - mean) / std), dim=-1)
    texts = F.normalize(model.encode_text(tokenizer_of(description)([TEMPLATE.format(row["label"]) for row in rows])), dim=-1)
    accuracy = ((images @ texts.T).argmax(1) == torch.arange(len(rows))).float().mean().item()
    assert accuracy >= floor


def test_asset_path_stays_in_its_folder():
    assert asset_path("models/tiny-en.json").is_file()
    with pytest.raises(DataError, match="leads out"):
        asset_path("../errors.py")
    with pytest.raises(DataError, match=r"choices: .*openmoji_color\.zip"):
        asset_path("emoji/apple.zip")
