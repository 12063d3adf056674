"""What is exported gives the method's own scores in open_clip, transformers, numpy and onnxruntime, by the page's own code."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import promptmix
from promptmix.cli import main
from promptmix.clip.load import openai_config, read_weights
from promptmix.data.datasets.emoji import write_sample
from promptmix.errors import ConfigError, DataError
from promptmix.predict.export import arrays_of, has_arrays
from promptmix.runs.calibration import Calibration
from promptmix.utils import write_json
from tests.trainers.toy import PIXELS, draw

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "export.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
NAMES = ["barn owl", "pine tree", "cat"]


def block(word):
    (found,) = [code for code in BLOCKS if word in code]
    return found


@pytest.fixture(scope="module")
def runs(room, tmp_path_factory):
    """Runs on a small CLIP in OpenAI's layout, and a picture of the size it takes."""
    pictures = tmp_path_factory.mktemp("own") / "pictures"
    write_sample(pictures, ("bird", "clock", "fruit"))
    out = tmp_path_factory.mktemp("runs")
    flags = ["--shots", "2", "--no-baseline", "--backbone", "ViT-B/16", "--weights", str(room / "clip.safetensors")]
    opts = ["INPUT.SIZE", f"({PIXELS}, {PIXELS})", "DATALOADER.NUM_WORKERS", "0", "OPTIM.MAX_EPOCH", "1"]
    for trainer in ("CoOp", "MoCoOp", "MaPLe", "CoCoOp"):
        assert main(["fit", str(pictures), "--trainer", trainer, "--output-dir", str(out), *flags, *opts]) == 0
    # Random weights tell no temperature by themselves.
    write_json(asdict(Calibration(1.7, 6, None, 0.9, 1.0, 8.0, 12.0)), out / "CoOp" / "calibration.json")
    draw(out / "toy")
    Image.open(out / "toy" / "test-0-0.png").save(out / "cat.png")
    return out


def export(runs, trainer, file, *more):
    weights = ["--weights", json.loads((runs / trainer / "results.json").read_text())["config"]["MODEL"]["BACKBONE"]["WEIGHTS"]]
    return main(["export", str(runs / trainer), "--classnames", ",".join(NAMES), "--output", str(file), *weights, *more])


def load(runs, trainer, **more):
    weights = json.loads((runs / trainer / "results.json").read_text())["config"]["MODEL"]["BACKBONE"]["WEIGHTS"]
    return promptmix.load(runs / trainer, weights=weights, temperature=1.0, **more)


def softmax(scores):
    return torch.as_tensor(np.asarray(scores)).double().softmax(-1)[0].tolist()


def expected(runs, trainer):
    found = load(runs, trainer).predict(runs / "cat.png", NAMES)[0]
    by_name = dict(zip(found.classnames, found.probabilities, strict=True))
    return [by_name[name] for name in NAMES]


def toy_model(room):
    state = read_weights(room / "clip.safetensors")
    model = open_clip.CLIP(**openai_config(state))
    model.load_state_dict(state)
    return model.eval()


def transformers_model(room):
    """The same CLIP in transformers' layout."""
    from transformers import CLIPConfig, CLIPModel

    state = read_weights(room / "clip.safetensors")
    config = openai_config(state)
    vision, text = config["vision_cfg"], config["text_cfg"]
    width = vision["width"]
    both = {"hidden_act": "quick_gelu", "projection_dim": config["embed_dim"]}
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": vision["layers"],
        "num_attention_heads": 1,
    }
    image = sizes | both | {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    words = sizes | both | {"num_hidden_layers": text["layers"], "vocab_size": text["vocab_size"]}
    made = CLIPConfig(text_config=words, vision_config=image, projection_dim=config["embed_dim"])
    model = CLIPModel(made).eval()
    theirs = {
        "embeddings.class_embedding": state["visual.class_embedding"],
        "embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "pre_layrnorm.weight": state["visual.ln_pre.weight"],
        "pre_layrnorm.bias": state["visual.ln_pre.bias"],
        "post_layernorm.weight": state["visual.ln_post.weight"],
        "post_layernorm.bias": state["visual.ln_post.bias"],
    }
    names = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    for i in range(vision["layers"]):
        ours = f"visual.transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            parts = state[f"{ours}.attn.in_proj_{kind}"].chunk(3)
            theirs |= {f"encoder.layers.{i}.self_attn.{n}_proj.{kind}": part for n, part in zip("qkv", parts, strict=True)}
            theirs |= {f"encoder.layers.{i}.{name}.{kind}": state[f"{ours}.{own}.{kind}"] for own, name in names.items()}
    missing, unexpected = model.vision_model.load_state_dict(theirs, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    model.visual_projection.weight.data = state["visual.proj"].T.contiguous()
    return model


def test_open_clip_by_the_pages_code(runs, room, tmp_path, monkeypatch):
    assert export(runs, "CoOp", tmp_path / "head.npz") == 0
    from open_clip.transform import image_transform

    look = image_transform(PIXELS, is_train=False, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD)
    made = lambda *names, **options: (toy_model(room), None, look)  # noqa: E731
    monkeypatch.setattr(open_clip, "create_model_and_transforms", made)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.png").write_bytes((runs / "cat.png").read_bytes())
    found = {}
    exec(block("create_model_and_transforms"), found)
    assert softmax(found["scores"]) == pytest.approx(expected(runs, "CoOp"), abs=1e-5)


def test_transformers_by_the_pages_code(runs, room, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    assert export(runs, "CoOp", tmp_path / "head.npz") == 0
    size = {"height": PIXELS, "width": PIXELS}
    processor = transformers.CLIPImageProcessor(size=size, crop_size=size, do_resize=False)
    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", lambda name: transformers_model(room))
    monkeypatch.setattr(transformers.CLIPImageProcessor, "from_pretrained", lambda name: processor)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.png").write_bytes((runs / "cat.png").read_bytes())
    found = {}
    exec(block("CLIPImageProcessor"), found)
    assert softmax(found["scores"]) == pytest.approx(expected(runs, "CoOp"), abs=1e-4)


def test_numpy_and_safetensors_by_the_pages_code(runs, room, tmp_path, monkeypatch):
    assert export(runs, "MoCoOp", tmp_path / "mixture.npz") == 0 and export(runs, "MoCoOp", tmp_path / "head.safetensors") == 0
    monkeypatch.chdir(tmp_path)
    feature = load(runs, "MoCoOp").predict(runs / "cat.png", embeddings=True)[0].embedding
    found = {"image": feature[None].numpy()}
    exec(block("np.einsum"), found)
    assert softmax(found["scores"]) == pytest.approx(expected(runs, "MoCoOp"), abs=1e-5)
    assert (found["shares"] > 0).sum() == int(found["head"]["k"]) == 2
    exec(block("safe_open"), found)
    assert found["names"] == NAMES and np.array_equal(found["weights"], found["head"]["weights"])
    assert "prompts/bank.before.0" in found["head"] and json.loads(str(found["head"]["about"]))["trainer"] == "MoCoOp"


@pytest.mark.parametrize("trainer", ["CoOp", "MoCoOp", "MaPLe"])
def test_onnx_by_the_pages_code(runs, tmp_path, monkeypatch, trainer, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    assert export(runs, trainer, tmp_path / "model.onnx") == 0
    assert "compared with the method in onnxruntime" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.png").write_bytes((runs / "cat.png").read_bytes())
    found = {}
    exec(block("onnxruntime.InferenceSession"), found)
    assert found["names"] == NAMES and softmax(found["logits"]) == pytest.approx(expected(runs, trainer), abs=1e-5)
    outputs = [output.name for output in onnxruntime.InferenceSession("model.onnx").get_outputs()]
    assert outputs == ["logits", "embedding", *(["routing"] if trainer == "MoCoOp" else [])]
    if trainer == "MoCoOp":
        routing = found["session"].run(["routing"], {"images": np.concatenate([found["images"], -found["images"]])})[0]
        assert routing.shape == (2, 5) and ((routing > 0).sum(1) == 2).all()
        assert routing.sum(1) == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize(
    ("trainer", "file", "words"),
    [
        ("MaPLe", "head.npz", "--format onnx"),
        ("CoCoOp", "head.npz", "anew for each picture"),
        ("CoCoOp", "model.onnx", "anew for each picture"),
        ("CoOp", "head.txt", ".npz"),
    ],
)
def test_what_arrays_can_not_say_is_refused(runs, tmp_path, trainer, file, words, capsys):
    assert export(runs, trainer, tmp_path / file) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("promptmix: error") == 1 and not list(tmp_path.iterdir())
    assert has_arrays(load(runs, trainer).classifier()[0]) == (trainer == "CoOp")


def test_a_graph_that_gives_other_scores_is_not_written(runs, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    from promptmix.predict import onnx

    monkeypatch.setattr(onnx, "_TOLERANCE", -1.0)
    assert export(runs, "CoOp", tmp_path / "model.onnx") == 2
    assert "nothing was written" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_missing_packages_are_one_line(runs, tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export(runs, "CoOp", tmp_path / "model.onnx") == 2
    assert "pip install 'promptmix[onnx]'" in capsys.readouterr().err


def test_weights_that_only_the_record_names_are_not_opened(runs, tmp_path, capsys):
    assert main(["export", str(runs / "CoOp"), "--output", str(tmp_path / "head.npz")]) == 2
    assert "name the file yourself" in capsys.readouterr().err


def test_the_web_pages_function_in_many_threads(runs, tmp_path, monkeypatch):
    weights = json.loads((runs / "CoOp" / "results.json").read_text())["config"]["MODEL"]["BACKBONE"]["WEIGHTS"]
    code = block("def classify").replace('"output/photos/CoOp"', f"{str(runs / 'CoOp')!r}, weights={weights!r}")
    found = {}
    exec(code, found)
    uploads = [path.read_bytes() for path in sorted((runs / "toy").iterdir())[:8]]
    alone = [found["classify"](upload) for upload in uploads]
    together = [None] * len(uploads)

    def work(i):
        for _ in range(3):
            together[i] = found["classify"](uploads[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(uploads))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone and sum(alone[0]["all"].values()) == pytest.approx(1, abs=1e-5)
    with pytest.raises(DataError, match="no format that Pillow knows"):
        found["classify"](b"<html>")


def test_temperature_moves_probabilities_and_not_the_order(runs):
    plain, warm = load(runs, "CoOp"), promptmix.load(runs / "CoOp", weights=load(runs, "CoOp").config.MODEL.BACKBONE.WEIGHTS)
    stored = json.loads((runs / "CoOp" / "calibration.json").read_text())["temperature"]
    assert warm.temperature == pytest.approx(stored) and plain.temperature == 1
    one, other = (predictor.predict(runs / "cat.png")[0] for predictor in (plain, warm))
    assert one.classnames == other.classnames and one.probabilities != other.probabilities
    scores = np.log(one.probabilities)
    assert softmax([scores / stored]) == pytest.approx(other.probabilities, abs=1e-5)
    with pytest.raises(ConfigError, match="positive"):
        promptmix.load(runs / "CoOp", weights=plain.config.MODEL.BACKBONE.WEIGHTS, temperature=0)


def test_predict_streams_lines_with_threshold_and_embeddings(runs, tmp_path, capsys):
    weights = load(runs, "CoOp").config.MODEL.BACKBONE.WEIGHTS
    flags = ["predict", "--model-dir", str(runs / "CoOp"), "--weights", weights, str(runs / "toy"), "--batch-size", "4"]
    file = tmp_path / "features.npz"
    assert main([*flags, "--format", "jsonl", "--top", "3", "--threshold", "0.3", "--embeddings", str(file)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 35 and all(found["probability"] >= 0.3 for row in rows for found in row["predictions"])
    kept = np.load(file)
    assert kept["image"].tolist() == [row["image"] for row in rows] and kept["embedding"].shape == (35, 64)
    assert np.linalg.norm(kept["embedding"], axis=1) == pytest.approx(np.ones(35), abs=1e-5)
    assert main([*flags, "--format", "csv", "--threshold", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith(",0,,")
    for more, words in (
        (["--threshold", "2"], "--threshold"),
        (["--temperature", "x"], "--temperature"),
        (["--embeddings", "a.txt"], ".npz"),
    ):
        assert main([*flags, *more]) == 2
        assert words in capsys.readouterr().err


def test_pictures_are_read_as_they_are_walked(runs):
    asked = []

    def walk():
        for path in sorted((runs / "toy").iterdir()):
            asked.append(path)
            yield path

    found = load(runs, "CoOp").stream(walk(), batch_size=2)
    next(found)
    assert len(asked) == 2


def test_arrays_of_the_runs_own_classes(runs):
    found = arrays_of(load(runs, "CoOp"))
    assert found.words["classnames"] == ("bird", "clock", "fruit") and found.arrays["weights"].shape == (3, 64)
    assert np.linalg.norm(found.arrays["weights"], axis=1) == pytest.approx(np.ones(3), abs=1e-4)
