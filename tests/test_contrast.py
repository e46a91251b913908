"""contrast.py against loops over pairs, closed forms and finite differences; two processes against one."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import as_double, close, lengths_mask, masked_batch, randn, small_model, unit_vectors
from torch import nn

import checkpoints
import common
from support import contrast

CONTRASTS = {
    "infonce": lambda image, text, temperature, bias, same: contrast.info_nce(image, text, temperature, same),
    "hinge": lambda image, text, temperature, bias, same: contrast.hardest_hinge(image, text, same=same),
    "sigmoid": contrast.sigmoid_contrast,
    "dcl": lambda image, text, temperature, bias, same: contrast.decoupled_contrast(image, text, temperature, same),
}


def contrast_of_a_row(name, positive, negatives, temperature):
    """One term of infonce, dcl or hinge in Python floats: one picture among texts, or one text among pictures."""
    total = sum(math.exp(c / temperature) for c in negatives)
    if name == "infonce":
        return (math.log(total + math.exp(positive / temperature)) - positive / temperature) / 2
    if name == "hinge":
        return max([0.0] + [0.2 + c - positive for c in negatives])
    if negatives:
        return (math.log(total) - positive / temperature) / 2
    return 0.0


def contrast_by_loops(name, image, text, temperature, bias, same):
    """Every contrast from its definition, one pair of rows after the other."""
    n = len(image)
    cosine = (image[:, None] * text[None]).sum(-1).tolist()
    total = 0.0
    for i in range(n):
        others = [j for j in range(n) if j != i and (same is None or not same[i, j])]
        if name == "sigmoid":
            total -= math.log(1 / (1 + math.exp(-cosine[i][i] / temperature - bias)))
            for j in others:
                total -= math.log(1 / (1 + math.exp(cosine[i][j] / temperature + bias)))
        else:
            total += contrast_of_a_row(name, cosine[i][i], [cosine[i][j] for j in others], temperature)
            total += contrast_of_a_row(name, cosine[i][i], [cosine[j][i] for j in others], temperature)
    return total / n


@pytest.mark.parametrize("name", CONTRASTS)
@pytest.mark.parametrize("pictures", [None, [0, 1, 2, 3, 4, 5], [0, 1, 0, 2, 1, 0], [3, 3, 3, 3, 3, 3]])
def test_contrasts_by_loops_and_finite_differences(name, pictures):
    image = unit_vectors(6, 4)
    text = unit_vectors(6, 4)
    same = None
    if pictures is not None:
        same = torch.tensor(pictures)[:, None] == torch.tensor(pictures)
    got = CONTRASTS[name](image, text, 0.3, -1.5, same)
    assert got.item() == pytest.approx(contrast_by_loops(name, image, text, 0.3, -1.5, same), abs=1e-10)
    inputs = [image, text, torch.tensor(0.3).double(), torch.tensor(-1.5).double()]
    for x in inputs:
        x.requires_grad_()

    def loss(image, text, temperature, bias):
        return CONTRASTS[name](image, text, temperature, bias, same) + 0 * (temperature + bias)  # some ignore them

    assert torch.autograd.gradcheck(loss, inputs)


def test_contrasts_in_closed_form():
    alike = torch.ones(5, 1).double()
    apart = torch.eye(5).double()
    assert contrast.info_nce(alike, alike, 0.07).item() == pytest.approx(math.log(5))
    assert contrast.info_nce(apart, apart, 0.5).item() == pytest.approx(math.log(1 + 4 * math.exp(-2)))
    assert contrast.decoupled_contrast(apart, apart, 0.5).item() == pytest.approx(math.log(4) - 2)
    assert contrast.hardest_hinge(alike, alike).item() == pytest.approx(0.4)  # the margin, both ways
    assert contrast.hardest_hinge(apart, apart).item() == 0
    image = unit_vectors(5, 3)
    text = unit_vectors(5, 3)
    logits = image @ text.T / 0.1
    labels = torch.arange(5)
    both = F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)
    close(contrast.info_nce(image, text, 0.1), both / 2)
    bce = F.binary_cross_entropy_with_logits(logits - 3.0, apart, reduction="sum") / 5
    close(contrast.sigmoid_contrast(image, text, 0.1, -3.0), bce)
    # SigLIP's start: a temperature of 0.1 and a bias of -10
    bce = F.binary_cross_entropy_with_logits(logits - 10.0, apart, reduction="sum") / 5
    close(contrast.sigmoid_contrast(image, text), bce)
    close(contrast.info_nce(image, text), contrast.info_nce(image, text, 0.07))
    close(contrast.decoupled_contrast(image, text), contrast.decoupled_contrast(image, text, 0.07))


@pytest.mark.parametrize("name", CONTRASTS)
@pytest.mark.parametrize("rows", [0, 1])
def test_contrasts_without_negatives_are_finite(name, rows):
    image = unit_vectors(rows, 4).requires_grad_()
    text = unit_vectors(rows, 4).requires_grad_()
    loss = CONTRASTS[name](image, text, 0.1, -10.0, None)
    loss.backward()
    want = contrast_by_loops(name, image, text, 0.1, -10.0, None) if rows else 0.0
    assert loss.item() == pytest.approx(want)
    assert image.grad.isfinite().all()
    assert text.grad.isfinite().all()


@pytest.mark.parametrize("name", CONTRASTS)
def test_contrasts_refuse_unequal_batches(name):
    with pytest.raises(ValueError, match=r"\(3, 4\) and texts \(2, 4\)"):
        CONTRASTS[name](randn(3, 4), randn(2, 4), 0.1, 0.0, None)


@pytest.mark.parametrize(("start", "bound"), [(9.0, math.log(100)), (-3.0, 0.0)])
def test_contrast_head_keeps_its_temperature_within_bounds(start, bound):
    head = contrast.ContrastHead(4, 4, 4)
    assert math.exp(-head.log_scale.item()) == pytest.approx(0.07)
    image = unit_vectors(5, 4)
    text = unit_vectors(5, 4)
    head.log_scale.data.fill_(start)
    head.eval()(image, text, torch.arange(5))
    assert head.log_scale.item() == pytest.approx(start)  # evaluation leaves it
    loss, logits = head.train()(image, text, torch.arange(5))
    loss.backward()
    assert head.log_scale.item() == pytest.approx(bound)
    assert head.log_scale.grad.abs() > 1e-6  # at the bound it can still learn
    close(logits.double(), image @ text.T * math.exp(bound), 1e-4)


@pytest.mark.parametrize("kind", CONTRASTS)
def test_contrast_head_computes_the_loss_of_its_kind(kind):
    head = contrast.ContrastHead(4, 4, 4, kind).double()
    image = unit_vectors(5, 4).requires_grad_()
    text = unit_vectors(5, 4)
    pictures = torch.tensor([0, 1, 0, 2, 3])
    loss, logits = head(image, text, pictures)
    loss.backward()
    same = pictures[:, None] == pictures
    start = 0.1 if kind == "sigmoid" else 0.07  # SigLIP's and CLIP's
    assert loss.item() == pytest.approx(contrast_by_loops(kind, image, text, start, -10.0, same))
    close(logits, image @ text.T / start, 1e-6)
    assert (head.bias is not None) == (kind == "sigmoid")
    if kind == "sigmoid":  # SigLIP's bias starts at -10 and learns
        assert head.bias.item() == -10
        assert head.bias.grad.abs() > 1e-3


def test_contrast_vectors_are_those_of_the_mean_region_and_of_cls():
    head = contrast.ContrastHead(4, 3, 5).double()
    states = randn(2, 4, 3)
    means = torch.stack([states[0].mean(0), states[1, :2].mean(0)])
    want = means @ head.project_image.weight.T
    close(head.image(states, lengths_mask(4, [4, 2])), want / want.norm(dim=1, keepdim=True))
    words = randn(2, 3, 4)
    want = words[:, 0] @ head.project_text.weight.T
    mask = lengths_mask(3, [3, 2])
    close(head.text(words, mask), want / want.norm(dim=1, keepdim=True))


def test_the_text_can_be_the_mean_of_its_words():
    head = contrast.ContrastHead(4, 3, 5, text_vector="mean").double()
    words = randn(2, 3, 4)
    want = torch.stack([words[0].mean(0), words[1, :2].mean(0)]) @ head.project_text.weight.T
    close(head.text(words, lengths_mask(3, [3, 2])), want / want.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("model", checkpoints.MODELS)
def test_the_config_says_what_the_vector_of_a_text_is(model):
    for text_vector in ("cls", "mean"):
        _, network = small_model(model, text_vector=text_vector)
        assert network.heads["itc"].text_vector == text_vector


def test_the_temperature_falls_by_half_a_cosine():
    values = [contrast.scheduled_temperature(0.2, 0.05, part / 10) for part in range(11)]
    assert values == sorted(values, reverse=True)
    assert [values[0], values[5], values[10]] == pytest.approx([0.2, 0.125, 0.05])


def contrast_gradients(rows, kind, share):
    """Loss and gradients of one process that has these rows and weights its loss by `share`, as one vector."""
    torch.manual_seed(1)
    head = contrast.ContrastHead(3, 3, 3, kind).double()
    projection = nn.Linear(4, 3).double()
    data = torch.randn(5, 8, dtype=torch.float64)[rows]
    image = F.normalize(projection(data[:, :4]), dim=-1)
    text = F.normalize(projection(data[:, 4:]), dim=-1)
    loss = head(image, text, torch.tensor([0, 1, 0, 2, 3])[rows])[0] * share
    loss.backward()
    parts = [loss.detach().flatten()]
    for parameter in [*projection.parameters(), *head.parameters()]:
        if parameter.grad is not None:
            parts.append(parameter.grad.flatten())
    return torch.cat(parts)


def one_of_two(rank, folder):
    """One of two processes, with 3 and 2 of the rows. Writes the sum over both processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    rows = [[0, 2, 4], [1, 3]][rank]
    for kind in CONTRASTS:
        found = contrast_gradients(rows, kind, len(rows) / 5)
        torch.distributed.all_reduce(found)
        torch.save(found, f"{folder}/{kind}.{rank}.pt")
    with torch.no_grad():  # a teacher's rows are gathered too
        assert contrast.gather_with_gradient(torch.full((rank + 1, 2), rank)).tolist() == [[0, 0], [1, 1], [1, 1]]
    with torch.inference_mode():
        assert len(contrast.gather_with_gradient(torch.zeros(rank + 1, 2))) == rank + 1
    assert common.all_reduce_sum([rank + 1.0, 10.0]).tolist() == [3.0, 20.0]
    torch.distributed.destroy_process_group()


def test_two_processes_contrast_as_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    for kind in CONTRASTS:
        want = contrast_gradients([0, 1, 2, 3, 4], kind, 1.0)
        assert want.abs().max() > 1e-3
        for rank in (0, 1):
            close(torch.load(tmp_path / f"{kind}.{rank}.pt"), want, 1e-10)


@pytest.mark.parametrize("name", ["uniter", "lxmert", "vilbert"])
def test_only_the_rows_that_are_pairs_are_encoded(name, monkeypatch):
    """The same loss and logits as of the vectors of all rows, of which the pairs are then taken."""
    _, model = small_model(name)
    batch = as_double(masked_batch(6, 0), pair_index=torch.tensor([0, 3, 4]))
    head = model.heads["itc"]
    text = head.text(model.encode(batch, regions=False).text, batch.text_mask)
    image = head.image(model.encode(batch, text=False).regions, batch.region_mask)
    expected = head(image[batch.pair_index], text[batch.pair_index], batch.pictures[batch.pair_index])
    rows = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda part, **given: rows.append(len(part.text)) or encode(part, **given))
    found = contrast.image_text_contrast(model, None, batch)
    assert rows == [3, 3]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
