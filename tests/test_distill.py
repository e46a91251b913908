"""distill.py and support/distillation.py: the losses of a teacher against sums by hand, and a student trained from the command line."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import as_double, close, joined, lengths_mask, masked_batch, randn, small_model

import checkpoints
import common
import distill
import tasks
import train
import uniter
import vilbert
from support import distillation


def taught(student, teacher, distill, **changes):
    """A run in which one small model learns from another."""
    paper, model = small_model(student, **changes)
    teacher_paper, other = small_model(teacher)
    names = SimpleNamespace(distill=distill, model=student, teacher=teacher)
    return SimpleNamespace(args=names, paper=paper, model=model, teacher_paper=teacher_paper, teacher=other.eval(),
                           teacher_tasks=["pretrain"], distilled=("mlm", "mrfr", "itm"), device=torch.device("cpu"), autocast=train.nullcontext)  # fmt: skip


@pytest.mark.parametrize("name", checkpoints.MODELS)
def test_nothing_is_left_to_learn_from_oneself(name):
    """Teacher = student, projections the identity: every loss of the teacher is 0; each grows with another student."""
    widths = (16, 8 if name == "vilbert" else 16)
    run = taught(name, name, "logits,attention,hidden", heads=("mlm", "itm", "itc", "hidden"), teacher_widths=widths)
    run.model.load_state_dict(run.teacher.state_dict(), strict=False)
    for layer in run.model.heads["hidden"].values():
        torch.nn.init.eye_(layer.weight)
    batch = as_double(masked_batch(3, 0))
    batch.region_mask[1, 2:] = False
    parts = distill.forward_with_teacher(run, batch, ["mlm", "itm"])
    extra = distill.distillation_losses(run, ["mlm", "itm"])
    assert set(extra) == {"mlm_soft", "itm_soft", "attention_kl", "attention_mse", "hidden"}
    for loss in extra:
        assert abs(parts[loss][0].item()) < 1e-12, loss
    for parameter in run.model.parameters():
        parameter.data *= 0.9
    parts = distill.forward_with_teacher(run, batch, ["mlm", "itm"])
    assert all(parts[loss][0] > 1e-5 for loss in extra)


def test_distillation_matches_layers_and_leaves_padding_out():
    """A student of one layer by hand: its layer beside the teacher's third, real positions only."""
    sizes = {"heads": ("mlm", "itm", "itc", "hidden"), "teacher_widths": (16, 16), "layers": 1, "hidden": 8}
    run = taught("uniter", "uniter", "attention,hidden", **sizes)
    batch = as_double(masked_batch(3, 0))
    batch.region_mask[1, 2:] = False
    real = torch.cat([batch.text_mask, batch.region_mask], 1)
    student, teacher = (m.encode(batch, record=True) for m in (run.model, run.teacher))
    parts = distill.forward_with_teacher(run, batch, ["itm"])
    project, total = run.model.heads["hidden"]["text"], 0.0
    for own, other in (("embedding", "embedding"), ("layer.0", "layer.2")):
        wrong = (project(student.states[own]) - teacher.states[other]).square()
        total += sum(wrong[row][real[row]].mean() for row in range(3)) / 3 / 2
    assert parts["hidden"][0].item() == pytest.approx(total.item())
    total = 0.0
    for row in range(3):
        own, other = (x[row][:, real[row]][..., real[row]] for x in (student.maps["layer.0"], teacher.maps["layer.2"]))
        total += (other * (other.log() - own.log())).sum(-1).mean() / 3
    assert parts["attention_kl"][0].item() == pytest.approx(total.item())


@pytest.mark.parametrize("whole_image", ["student", "teacher"])
def test_maps_of_a_model_with_the_whole_image_in_front_begin_with_it(whole_image):
    """The attention loss compares the last positions, whichever of the two models has one more."""
    batch = SimpleNamespace(text_mask=torch.ones(2, 3, dtype=torch.bool), region_mask=torch.tensor([[True] * 4] * 2))
    batch.region_mask[1, 3] = False
    longer = torch.randn(2, 1, 3, 5).softmax(-1)
    shorter = torch.randn(2, 1, 3, 4).softmax(-1)
    longer_keys = torch.randn(2, 1, 5, 3).softmax(-1)
    shorter_keys = torch.randn(2, 1, 4, 3).softmax(-1)
    long = SimpleNamespace(maps={"cross.0.text_to_regions": longer, "cross.0.regions_to_text": longer_keys})
    short = SimpleNamespace(maps={"cross.0.text_to_regions": shorter, "cross.0.regions_to_text": shorter_keys})
    cut = SimpleNamespace(
        maps={"cross.0.text_to_regions": longer[..., 1:], "cross.0.regions_to_text": longer_keys[:, :, 1:]}
    )
    if whole_image == "student":
        found = distill.attention_losses(None, long, short, batch)
        expected = distill.attention_losses(None, cut, short, batch)
    else:
        found = distill.attention_losses(None, short, long, batch)
        expected = distill.attention_losses(None, short, cut, batch)
    torch.testing.assert_close(found, expected)


def test_a_whole_image_that_one_model_lacks_is_left_out():
    """LXMERT learns from ViLBERT, whose regions have the whole image in front: by hand, map by map, state by state."""
    run = taught("lxmert", "vilbert", "attention,hidden", heads=("itm", "hidden"), teacher_widths=(16, 8))
    batch = as_double(masked_batch(3, 0))
    batch.region_mask[1, 2:] = False
    student, teacher = (m.encode(batch, record=True) for m in (run.model, run.teacher))
    masks, total = {"text": batch.text_mask, "regions": batch.region_mask}, []
    for own, other in (("text.0", "text.1"), ("text.1", "text.3"), ("regions.0", "regions.1"), *(
        (name, name) for i in (0, 1) for name in (f"cross.{i}.text_to_regions", f"cross.{i}.regions_to_text")
    )):  # fmt: skip
        asks, _, answers = own.split(".")[-1].partition("_to_")
        if asks.isdigit():
            asks = answers = own.split(".")[0]
        p, t = student.maps[own], teacher.maps[other]
        t = t[:, :, 1:] if asks == "regions" else t
        t = t[..., 1:] if answers == "regions" else t
        rows = []
        for row in range(3):
            a, b = (x[row][:, masks[asks][row]][..., masks[answers][row]] for x in (p, t))
            b = b / b.sum(-1, keepdim=True)
            rows.append((b * (b.log() - a.log())).sum(-1).mean())
        total.append(sum(rows) / 3)
    parts = distill.forward_with_teacher(run, batch, ["itm"])
    assert parts["attention_kl"][0].item() == pytest.approx((sum(total) / len(total)).item())
    names = [("text.embedding",) * 2, ("regions.embedding",) * 2, ("text.0", "text.1"), ("text.1", "text.3")]
    names += [("regions.0", "regions.1"), *((f"cross.{i}.{side}",) * 2 for i in (0, 1) for side in masks)]
    total = 0.0
    for own, other in names:
        side = "regions" if "regions" in own else "text"
        wrong = run.model.heads["hidden"][side](student.states[own]) - teacher.states[other][:, side == "regions" :]
        total += sum(wrong[row][masks[side][row]].square().mean() for row in range(3)) / 3 / len(names)
    assert parts["hidden"][0].item() == pytest.approx(total.item())


@pytest.mark.parametrize(("student", "teacher"), [("lxmert", "vilbert"), ("vilbert", "lxmert"), ("uniter", "lxmert")])
def test_one_architecture_teaches_another(student, teacher):
    """ViLBERT's maps and states without the whole image; where no layer is of one kind, the last states."""
    widths = (16, 8 if teacher == "vilbert" else 16)
    run = taught(student, teacher, "logits,hidden", heads=("mlm", "itm", "itc", "hidden"), teacher_widths=widths)
    if student != "uniter":
        run.args.distill = "logits,attention,hidden"
    batch = as_double(masked_batch(3, 0))
    batch.region_mask[1, 2:] = False
    parts = distill.forward_with_teacher(run, batch, ["mlm", "itm"])
    sum(loss for loss, _ in parts.values()).backward()
    assert all(p.grad is None for p in run.teacher.parameters())
    assert run.model.heads["hidden"]["regions"].weight.grad.abs().max() > 0
    before = {name: parts[name][0].item() for name in distill.distillation_losses(run, ["mlm", "itm"])}
    batch.features[1, 2:] += 1.0  # padding must not matter
    after = distill.forward_with_teacher(run, batch, ["mlm", "itm"])
    assert before == pytest.approx({name: after[name][0].item() for name in before})
    if student == "uniter":
        run.args.distill = "attention"
        with pytest.raises(common.UserError, match="no map of uniter"):
            distill.forward_with_teacher(run, batch, ["mlm"])


@pytest.mark.parametrize(
    ("model", "name"), [("uniter", "mlm"), ("uniter", "mrfr"), ("lxmert", "mrfr"), ("uniter", "itm")]
)
def test_distilled_parts_of_unlike_size_give_the_gradients_of_the_whole(model, name):
    sizes = {"heads": ("mlm", "mrfr", "itm", "itc", "hidden"), "teacher_widths": (16, 16)}
    run = taught(model, "uniter", "logits,hidden" if model == "lxmert" else "logits,attention,hidden", **sizes)
    a, b = as_double(masked_batch(3, 1)), as_double(masked_batch(5, 2))
    found = []
    for batches in ([joined(a, b)], [a, b]):
        run.model.zero_grad()
        losses = train.backward(run, batches, [name])
        found.append([*losses.values(), *(p.grad.clone() for p in run.model.parameters() if p.grad is not None)])
    assert {name, f"{name}_soft", "hidden"} <= set(losses)
    for whole, split in zip(*found, strict=True):
        torch.testing.assert_close(whole, split, atol=1e-10, rtol=1e-7)


def teacher_checkpoint(name, **changes):
    """A small model as a checkpoint holds it, with dropout everywhere."""
    _, model = small_model(name, dropout=0.5, **changes)
    trained = [objective for objective in model.config.heads if objective in checkpoints.MODELS[name].OBJECTIVES]
    return {"model": name, "task": "pretrain", "objectives": dict.fromkeys(trained, 1), "state": model.state_dict(),
            "config": dataclasses.asdict(model.config)}  # fmt: skip


def student_of(checkpoint, name, objectives, distill_what="logits"):
    """A run of a small student that has read its teacher, as train.py makes it."""
    heads = ("mlm", "mrfr", "mrc", "itm", "itc")
    paper, model = small_model(name, heads=heads)
    args = SimpleNamespace(distill=distill_what, model=name, teacher="teacher.pt", data="own", task="pretrain")
    splits = {"train": SimpleNamespace(store=SimpleNamespace(width=8))}
    run = SimpleNamespace(args=args, paper=paper, model=model, splits=splits, device=torch.device("cpu"))
    run.objectives = dict.fromkeys(objectives, 1)
    distill.read_teacher(run, checkpoint)
    run.teacher.double()
    distill.match_teacher(run, checkpoint)
    return run


@pytest.mark.parametrize("name", checkpoints.MODELS)
def test_the_teacher_computes_without_dropout_and_does_not_learn(name):
    """Its logits are those of the same weights in eval mode, also once the student is set to training."""
    checkpoint = teacher_checkpoint(name)
    run = student_of(checkpoint, name, ["mlm", "itm"])
    run.model.train()
    batch = as_double(masked_batch(3, 0))
    soft = [distill.forward_with_teacher(run, batch, ["mlm", "itm"])["mlm_soft"][0] for _ in range(2)]
    paper = checkpoints.MODELS[name]
    same = paper.MODEL(paper.Config(**checkpoint["config"])).double().eval()
    same.load_state_dict(checkpoint["state"])
    with torch.no_grad():
        logits = same(batch, ["mlm"])["mlm"][1]
    expected = distillation.soft_label_loss(run.model(batch, ["mlm"])["mlm"][1], logits)
    assert soft[0].item() == soft[1].item() == pytest.approx(expected.item())
    assert not any(parameter.requires_grad for parameter in run.teacher.parameters())


@pytest.mark.parametrize("name", checkpoints.MODELS)
def test_soft_labels_of_contrast_go_both_ways(name):
    """Pictures as classes of a text count as much as texts as classes of a picture; against torch's kl_div."""
    checkpoint = teacher_checkpoint(name)
    run = student_of(checkpoint, name, ["itc"])
    run.model.eval()
    batch = as_double(masked_batch(3, 0))
    batch.pair_index, batch.pictures = torch.arange(3), torch.arange(3)
    with torch.no_grad():
        soft = distill.forward_with_teacher(run, batch, ["itc"])["itc_soft"][0]
        logits = run.model(batch, ["itc"])["itc"][1]
        theirs = run.teacher(batch, ["itc"])["itc"][1]
    expected = 0.0
    for axis in (0, 1):
        log_p, log_t = (logits / 2).log_softmax(axis), (theirs / 2).log_softmax(axis)
        expected += 4 * F.kl_div(log_p, log_t, log_target=True, reduction="sum") / 3 / 2
    assert soft.item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("student", "teacher", "classes", "reason"),
    [
        ("uniter", "uniter", 5, None),
        ("uniter", "vilbert", 5, None),
        ("uniter", "lxmert", 6, None),  # LXMERT leaves background out: 5 logits
        ("uniter", "lxmert", 5, "the student has 5 region classes, the teacher 4"),
        ("lxmert", "uniter", 5, "the student has 4 region classes, the teacher 5"),
        ("uniter", "uniter", 9, "the student has 5 region classes, the teacher 9"),
    ],
)
def test_region_classes_are_distilled_where_both_have_as_many(student, teacher, classes, reason, capsys):
    checkpoint = teacher_checkpoint(teacher, heads=("mlm", "mrc"), classes=classes)
    run = student_of(checkpoint, student, ["mlm", "mrc", "itm"])
    printed = capsys.readouterr().out
    assert "logits of itm are not distilled: the teacher was not trained for it" in printed
    assert run.distilled == (("mlm", "mrc") if reason is None else ("mlm",))
    assert reason is None or f"logits of mrc are not distilled: {reason}" in printed


def test_objectives_that_the_teacher_lacks_are_left_out(capsys):
    """LXMERT predicts attributes, UNITER does not."""
    run = student_of(teacher_checkpoint("uniter"), "lxmert", ["mlm", "attr"])
    assert run.distilled == ("mlm",)
    assert "logits of attr are not distilled: the teacher was not trained for it" in capsys.readouterr().out


def test_a_smaller_student_from_the_command_line(pictures, tmp_path, here, capsys):
    options = ["--data", pictures, "--task", "vqa", "--steps", 2]
    here(*options, "--out", "teacher")
    small = ["--config", "layers=1", "hidden=64", "--teacher", "{model}.pt", "--distill", "logits,attention,hidden"]
    (tmp_path / "teacher/best.pt").rename(tmp_path / "uniter.pt")
    here(*options, *small, "--out", "student")
    logged = [json.loads(line) for line in (tmp_path / "student/log.jsonl").read_text().splitlines()]
    assert {"vqa", "vqa_soft", "attention_kl", "attention_mse", "hidden"} <= set(logged[1])
    student, teacher = (checkpoints.load_checkpoint(tmp_path / f) for f in ("student/best.pt", "uniter.pt"))
    assert student["config"]["layers"] == 1 and student["state"]["pooler.dense.weight"].shape == (64, 64)
    assert student["tokenizer"] == teacher["tokenizer"] and student["answers"] == teacher["answers"]
    here(*options, *small, "--out", "student", "--resume", "--steps", 3)
    here(*options, *small[:3], "--out", "student", "--resume", "--steps", 3, code=2)  # without the teacher
    here("--data", pictures, "--teacher", "uniter.pt", code=2)
    three = ["--teacher", "uniter.pt", "--distill", "attention", "--config", "hidden=48", "attention_heads=3"]
    here(*options, *three, "--out", "student", code=2)
    assert (tmp_path / "student/best.pt").exists()  # found before the earlier run is removed
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and "--teacher was uniter.pt, now None" in errors[0] and "not trained for it" in errors[1]
    assert "4 attention heads of the teacher cannot be shared by 3" in errors[2]


def test_answers_that_the_teacher_does_not_know_are_counted(pictures, tmp_path, here, capsys):
    here("--data", pictures, "--task", "vqa", "--steps", 1, "--out", "teacher")
    one = pictures.read_text().replace('"yes"', '"oui"')
    both = one.replace('"no"', '"non"')
    own = pictures.parent / "other.jsonl"
    options = ["--data", own, "--task", "vqa", "--steps", 1, "--teacher", "teacher/best.pt", "--out", "other"]
    own.write_text(one)
    here(*options)
    assert "knows 1 of 2 answers; the others count as wrong" in capsys.readouterr().out
    own.write_text(both)
    here(*options, code=2)
    assert "knows none of the 2 answers" in capsys.readouterr().err
    here(*options, "--distill", "hidden")  # which needs no answers in common
    assert checkpoints.load_checkpoint(tmp_path / "other/best.pt")["answers"] == ["non", "oui"]


# ---- distillation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.0])
def test_soft_label_loss_equals_torch(temperature):
    student = randn(4, 5, requires_grad=True)
    teacher = randn(4, 5) * 3
    log_probs = F.log_softmax(student / temperature, 1)
    want = F.kl_div(log_probs, F.softmax(teacher / temperature, 1), reduction="batchmean") * temperature**2
    close(distillation.soft_label_loss(student, teacher, temperature), want)
    assert torch.autograd.gradcheck(lambda s: distillation.soft_label_loss(s, teacher, temperature), student)


def test_soft_label_loss_of_special_cases():
    student = randn(4, 5)
    teacher = randn(4, 5)
    close(
        distillation.soft_label_loss(teacher + 5.0, teacher), torch.zeros(()).double()
    )  # a softmax ignores a constant
    assert distillation.soft_label_loss(student[:0], teacher[:0]) == 0


def test_features_are_distilled_by_their_squared_difference():
    student = randn(4, 5)
    teacher = randn(4, 5)
    close(distill.logits_loss(uniter.OBJECTIVES["mrfr"], student, teacher, None), F.mse_loss(student, teacher))


def test_the_rows_of_one_example_are_its_classes():
    """One logit a row: three rows of each of two examples."""
    student = randn(6)
    teacher = randn(6)
    batch = SimpleNamespace(ids=["a", "b"])
    want = distillation.soft_label_loss(student.view(2, 3), teacher.view(2, 3))
    close(distill.logits_loss(uniter.OBJECTIVES["rank"], student, teacher, batch), want)


def test_soft_labels_keep_their_gradient_at_high_temperature():
    """Hinton's section 2.1: for T large and logits of mean 0, the gradient is (student - teacher) / K, whatever T."""
    student = randn(1, 5)
    student = (student - student.mean()).requires_grad_()
    teacher = randn(1, 5)
    teacher = teacher - teacher.mean()
    distillation.soft_label_loss(student, teacher, 1e4).backward()
    close(student.grad, (student - teacher).detach() / 5, 1e-3)


@pytest.mark.parametrize("tokens", [(2, 0), (0, 2), (2, 2)])
def test_task_tokens_of_one_model_alone_shift_the_words(tokens):
    models = [SimpleNamespace(config=vilbert.Config(vocab_size=9, task_tokens=number)) for number in tokens]
    run = SimpleNamespace(args=SimpleNamespace(distill="hidden"), model=models[0], teacher=models[1])
    if tokens == (2, 2):
        distillation.check_task_tokens(run)
        return
    with pytest.raises(common.UserError, match="task tokens"):
        distill.match_teacher(run, {})
    run.args.distill = "logits"
    distillation.check_task_tokens(run)


def test_layers_are_paired_uniformly_and_last_with_last():
    assert distillation.layer_map(2, 6) == [2, 5]
    assert distillation.layer_map(1, 3) == [2]
    assert distillation.layer_map(4, 4) == [0, 1, 2, 3]
    assert distillation.layer_map(4, 2) == [0, 0, 0, 1]


def test_neighbouring_heads_are_averaged_and_must_divide():
    maps = randn(2, 4, 3, 3)
    close(distillation.average_heads(maps, 2)[:, 1], (maps[:, 2] + maps[:, 3]) / 2)
    close(distillation.average_heads(maps, 4), maps)
    with pytest.raises(common.UserError, match="4 attention heads of the teacher cannot be shared by 3"):
        distillation.average_heads(maps, 3)


@pytest.mark.parametrize("heads", [2, 4])
def test_attention_losses_by_loops(heads):
    """Against torch's kl_div on maps and the squared difference of the logits themselves, visible keys only."""
    queries = lengths_mask(3, [3, 2])
    keys = lengths_mask(5, [5, 3])
    bias = common.attention_bias(keys, torch.float64)
    a = randn(2, 2, 3, 5, requires_grad=True)
    b = randn(2, heads, 3, 5)
    teacher = (b + bias).softmax(-1)
    got = distillation.attention_loss((a + bias).softmax(-1), teacher, queries, keys)
    shared = teacher
    if heads == 4:
        shared = torch.stack([teacher[:, :2].mean(1), teacher[:, 2:].mean(1)], 1)
    kl = 0.0
    mse = 0.0
    for row, (words, visible) in enumerate([(3, 5), (2, 3)]):
        for head in range(2):
            for query in range(words):
                ours = a[row, head, query, :visible]
                theirs = shared[row, head, query, :visible]
                kl += F.kl_div(ours.log_softmax(0), theirs, reduction="sum") / (2 * words * 2)
                logits = b[row, head, query, :visible] if heads == 2 else theirs.log()
                mse += F.mse_loss(ours - ours.mean(), logits - logits.mean()) / (2 * words * 2)
    close(got[0], kl)
    close(got[1], mse, 1e-10)
    for part in (0, 1):
        loss = lambda a, part=part: distillation.attention_loss((a + bias).softmax(-1), teacher, queries, keys)[part]
        assert torch.autograd.gradcheck(loss, a)
    nothing = distillation.attention_loss(teacher, teacher, queries, torch.zeros(2, 5, dtype=torch.bool))
    assert nothing[0] == 0
    assert nothing[1] == 0


def test_hidden_loss_by_hand():
    student = randn(2, 4, 3, requires_grad=True)
    teacher = randn(2, 4, 3)
    mask = lengths_mask(4, [4, 1])
    want = (F.mse_loss(student[0], teacher[0]) + F.mse_loss(student[1, :1], teacher[1, :1])) / 2
    close(distillation.hidden_loss(student, teacher, mask), want)
    assert torch.autograd.gradcheck(lambda s: distillation.hidden_loss(s, teacher, mask), student)
    assert distillation.hidden_loss(student, teacher, torch.zeros(2, 4, dtype=torch.bool)) == 0


def test_a_teacher_of_pretraining_does_not_teach_captions():
    model = small_model("uniter")[1]
    run = SimpleNamespace(paper=uniter, teacher_paper=uniter, model=model, teacher=model)
    reason = "the teacher was not trained for it"
    for own, of_teacher in (("caption", "mlm"), ("mlm", "caption")):
        assert distillation.why_not_comparable(run, own, [of_teacher]) == reason
        assert distillation.why_not_comparable(run, own, ["itm", own]) is None
    run.teacher = small_model("uniter", vocab_size=32)[1]  # a table longer than the list of word pieces
    assert distillation.why_not_comparable(run, "mlm", ["mlm"]) == "the student has 30 word pieces, the teacher 32"
    assert distillation.why_not_comparable(run, "itm", ["itm"]) is None


def test_nce_does_not_teach_feature_regression():
    """Both train the head "mrfr", one for dot products."""
    model = small_model("vilbert", heads=("mlm", "mrfr", "mrc"))[1]
    run = SimpleNamespace(paper=vilbert, teacher_paper=vilbert, model=model, teacher=model)
    assert distillation.why_not_comparable(run, "mrfr", ["mlm", "nce"]) == "the teacher was not trained for it"
    assert distillation.why_not_comparable(run, "mrfr", ["mrfr"]) is None
    assert distillation.why_not_comparable(run, "mrc_kl", ["mrc"]) is None


def test_the_teacher_reads_its_own_number_of_a_task(monkeypatch):
    """A task token: the teacher knows vqa and refer as tasks 0 and 1, the student refer as its only one."""
    sizes = {"heads": ("refer",), "twelve_in_one": True}
    paper, model = small_model("vilbert", task_tokens=1, **sizes)
    _, teacher = small_model("vilbert", task_tokens=2, **sizes)
    run = SimpleNamespace(
        args=SimpleNamespace(distill="logits"), paper=paper, teacher_paper=paper, distilled=("refer",)
    )
    run.model = model.eval()
    run.teacher = teacher.eval()
    run.teacher_tasks = ["vqa", "refer"]
    batch = as_double(masked_batch(3, 0))
    batch.target = torch.rand(batch.region_mask.shape, dtype=torch.float64)
    batch.task = torch.zeros(3, dtype=torch.long)
    found = distill.forward_with_teacher(run, batch, ["refer"])["refer_soft"][0]
    _, logits = paper.OBJECTIVES["refer"].loss(model, model.encode(batch), batch)
    for number in (0, 1):
        batch.task = torch.full((3,), number)
        _, labels = paper.OBJECTIVES["refer"].loss(teacher, teacher.encode(batch), batch)
        expected = distillation.soft_label_loss(logits, labels)
        assert (abs(found - expected) < 1e-12) == (number == 1)


def test_a_teacher_with_fewer_text_types_is_refused():
    run = SimpleNamespace(args=SimpleNamespace(distill="logits", teacher="t.pt", model="uniter", task="vcr"))
    run.paper = run.teacher_paper = uniter
    run.model = run.teacher = SimpleNamespace(config=uniter.Config(types=2))
    with pytest.raises(common.UserError, match="t.pt: has too few text types for vcr"):
        distillation.check_same_rows(run, tasks.TASKS["vcr"])
