"""formats.py: the names and sizes of published checkpoints: BERT's, those of the three papers' authors, Hugging Face's.

Each paper has one table of names, two functions that apply it and do what a table of names cannot (tied matrices,
stacked projections, rows in another order), and one function that finds the fields of its Config in a state dict.
FORMATS at the end lists them. A state dict is {parameter name: tensor}.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

import lxmert
import uniter
import vilbert
from common import UserError

# ---- names -------------------------------------------------------------------------------------------------------

# A table of names holds pairs (ours, official). Each is a plain replacement; they are applied in the order of the table.

OLD_NAMES = [  # of a model saved from DistributedDataParallel, and of TF's norms
    ("module.", ""),
    ("LayerNorm.gamma", "LayerNorm.weight"),
    ("LayerNorm.beta", "LayerNorm.bias"),
]

BERT_NAMES = [  # what all three official codes have from BERT
    ("text_embedding.words", "bert.embeddings.word_embeddings"),
    ("text_embedding.positions", "bert.embeddings.position_embeddings"),
    ("text_embedding.types", "bert.embeddings.token_type_embeddings"),
    ("text_embedding.norm", "bert.embeddings.LayerNorm"),
    ("feed_forward.up", "intermediate.dense"),
    ("feed_forward.down", "output.dense"),
    ("feed_forward.norm", "output.LayerNorm"),
    ("attention.query", "attention.self.query"),
    ("attention.key", "attention.self.key"),
    ("attention.value", "attention.self.value"),
    ("attention.output", "attention.output.dense"),
    ("attention.norm", "attention.output.LayerNorm"),
    ("heads.mlm.transform.norm", "cls.predictions.transform.LayerNorm"),
    ("heads.mlm.", "cls.predictions."),
]


def rename(name, table):
    """One parameter name under another convention."""
    for old, new in table:
        name = name.replace(old, new)
    return name


def names_to_official(state, table, clash):
    """Our state dict under the official names.

    The official codes save the matrix of the masked-word head too, which is the word table. So it is listed twice.
    ValueError, saying `clash`, where two of our parameters have one official name.
    """
    out = {}
    for name, tensor in state.items():
        out[rename(name, table)] = tensor
    if len(out) < len(state):
        raise ValueError(clash)
    if "cls.predictions.bias" in out:
        out["cls.predictions.decoder.weight"] = state["text_embedding.words.weight"]
    return out


def strip_old_names(state):
    """An official state dict without old spellings and without the masked-word head's matrix, the word table again."""
    plain = {}
    for name, tensor in state.items():
        name = rename(name, OLD_NAMES)
        if name != "cls.predictions.decoder.weight":
            plain[name] = tensor
    return plain


def names_to_ours(state, names, table):
    """An official state dict, without old spellings, under our names.

    names: those of the model that will load it, `model.state_dict()`. Returns (state, unexpected official names).
    Names that have no tensor are left out of the state. A tensor goes to all heads with its official name.
    """
    ours = {}  # official name -> our names
    for name in names:
        ours.setdefault(rename(name, table), []).append(name)
    found = {}
    unexpected = []
    for name, tensor in state.items():
        for own_name in ours.get(name, ()):
            found[own_name] = tensor
        if name not in ours:
            unexpected.append(name)
    return found, unexpected


def normalize_bert_names(state):
    """BERT's own state dict under the names `bert.embeddings...`, `bert.encoder...`, `bert.pooler...`, `cls...`.

    Takes away `module.`; renames `uniter.` to `bert.`; puts `bert.` where a bare BertModel was saved.
    KeyError if it holds no BERT: RoBERTa, DistilBERT and others have their own prefixes or layers.
    """
    out = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.").replace("uniter.", "bert.")
        if name.startswith(("embeddings.", "encoder.", "pooler.")):
            name = "bert." + name
        out[name] = tensor
    for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight"):
        if name not in out:
            raise KeyError(name)
    return out


# ---- names: UNITER -----------------------------------------------------------------------------------------------

UNITER_OFFICIAL = [
    *BERT_NAMES,
    ("region_embedding.features_norm", "uniter.img_embeddings.img_layer_norm"),
    ("region_embedding.features", "uniter.img_embeddings.img_linear"),
    ("region_embedding.boxes_norm", "uniter.img_embeddings.pos_layer_norm"),
    ("region_embedding.boxes", "uniter.img_embeddings.pos_linear"),
    ("region_embedding.norm", "uniter.img_embeddings.LayerNorm"),
    ("region_embedding.mask", "uniter.img_embeddings.mask_embedding.weight"),
    ("layers.", "bert.encoder.layer."),
    ("pooler.", "bert.pooler."),
    ("bert.", "uniter."),
    ("heads.mrfr.transform.dense", "feat_regress.net.0"),
    ("heads.mrfr.transform.norm", "feat_regress.net.2"),
    ("heads.mrfr.", "feat_regress."),
    ("heads.mrc.", "region_classifier.net."),
    ("heads.nlvr2.left", "attn1"),
    ("heads.nlvr2.right", "attn2"),
    ("heads.nlvr2.join", "fc.0"),
    ("heads.nlvr2.score", "attn_pool.fc.0"),
    ("heads.nlvr2.output", "nlvr2_output"),
    ("heads.ve.", "vqa_output."),  # the official entailment model is a VQA model with three answers
    ("heads.refer.", "re_output."),
    ("heads.itm.", "itm_output."),
    ("heads.rank.", "rank_output."),
    ("heads.vqa.", "vqa_output."),
    ("heads.vcr.", "vcr_output."),
    ("heads.nlvr2.", "nlvr2_output."),
]

UNITER_FROM_BERT = ("text_embedding.", "layers.", "pooler.")  # what BERT's weights must supply


def uniter_to_official(state):
    """Our state dict under the official names, tied matrices listed twice, as the official code saves them.

    ValueError for a model with heads for both VQA and entailment: officially they have one name.
    """
    clash = "heads vqa and ve share one official name: export them from two models"
    out = names_to_official(state, UNITER_OFFICIAL, clash)
    for side in ("attn1", "attn2"):  # torch's MultiheadAttention stacks query, key and value
        for kind in ("weight", "bias"):
            if f"{side}.query.{kind}" in out:
                parts = [out.pop(f"{side}.{part}.{kind}") for part in ("query", "key", "value")]
                out[f"{side}.in_proj_{kind}"] = torch.cat(parts)  # 3 x (C, C) -> (3C, C)
                out[f"{side}.out_proj.{kind}"] = out.pop(f"{side}.output.{kind}")
    mask = "uniter.img_embeddings.mask_embedding.weight"
    out[mask] = torch.stack([torch.zeros_like(out[mask]), out[mask]])  # (F,) -> (2, F), row 0 = not masked
    if "feat_regress.bias" in out:
        out["feat_regress.weight"] = out["uniter.img_embeddings.img_linear.weight"]
    return out


def uniter_from_official(state, names):
    """An official state dict under our names, see `names_to_ours`. Accepts the prefixes `module.` and `bert.` and TF's
    gamma and beta."""
    given = {}
    for name, tensor in strip_old_names(state).items():
        if name.startswith("bert."):
            name = "uniter." + name.removeprefix("bert.")
        if ".in_proj_" in name:
            side, kind = name.split(".in_proj_")
            query, key, value = tensor.chunk(3)  # (3C, C) -> 3 x (C, C)
            given[f"{side}.query.{kind}"] = query
            given[f"{side}.key.{kind}"] = key
            given[f"{side}.value.{kind}"] = value
        elif name.endswith("mask_embedding.weight"):
            given[name] = tensor[1]
        elif name != "feat_regress.weight":  # tied
            given[name.replace(".out_proj.", ".output.")] = tensor
    return names_to_ours(given, names, UNITER_OFFICIAL)


# ---- names: ViLBERT ----------------------------------------------------------------------------------------------

VILBERT_OFFICIAL = [
    ("text_embedding.tasks", "bert.embeddings.task_embeddings"),
    ("region_embedding.features", "bert.v_embeddings.image_embeddings"),
    ("region_embedding.boxes", "bert.v_embeddings.image_location_embeddings"),
    ("region_embedding.norm", "bert.v_embeddings.LayerNorm"),
    *BERT_NAMES,
    ("gate_query", "attention.self.dyLinear_q"),
    ("gate_key", "attention.self.dyLinear_k"),
    ("text_reads.query", "biattention.query2"),  # 1 is the picture, 2 the text
    ("text_reads.key", "biattention.key1"),
    ("text_reads.value", "biattention.value1"),
    ("text_reads.output", "biOutput.dense2"),
    ("text_reads.norm", "biOutput.LayerNorm2"),
    ("regions_read.query", "biattention.query1"),
    ("regions_read.key", "biattention.key2"),
    ("regions_read.value", "biattention.value2"),
    ("regions_read.output", "biOutput.dense1"),
    ("regions_read.norm", "biOutput.LayerNorm1"),
    ("unused", "biOutput.q_dense"),
    (".text_", ".t_"),  # what is left in a co-attention layer: text_feed_forward and region_feed_forward
    (".region_", ".v_"),
    ("text_layers.", "bert.encoder.layer."),
    ("region_layers.", "bert.encoder.v_layer."),
    ("connections.", "bert.encoder.c_layer."),
    ("text_pooler.", "bert.t_pooler."),
    ("region_pooler.", "bert.v_pooler."),
    ("heads.mrfr.", "heads.mrc."),  # the official code has one region head, for classes or for features
    ("heads.mrc.0", "cls.imagePredictions.transform.dense"),
    ("heads.mrc.2", "cls.imagePredictions.transform.LayerNorm"),
    ("heads.mrc.3", "cls.imagePredictions.decoder"),
    ("heads.itm.", "cls.bi_seq_relationship."),
    ("heads.vqa.main.", "vil_prediction.main."),
    ("heads.vqa.", "vil_prediction.logit_fc."),
    ("heads.gqa.", "vil_prediction_gqa.logit_fc."),
    ("heads.nlvr2.", "vil_binary_prediction.logit_fc."),
    ("heads.ve.", "vil_tri_prediction."),
    ("heads.vcr.", "vil_logit."),  # one score for every task with choices
    ("heads.rank.", "vil_logit."),
    ("heads.refer.", "vision_logit."),
    ("heads.word.", "linguisic_logit."),
]

VILBERT_FROM_BERT = ("text_embedding.", "text_layers.")  # what BERT's weights must supply; its pooler has no place here
VILBERT_FLIPPED = ("cls.bi_seq_relationship.weight", "cls.bi_seq_relationship.bias")  # the official class 0 is "match"


def vilbert_to_official(state):
    """Our state dict under the official names, tied matrices listed twice, as the official code saves them.

    ValueError where two of our heads have one official name: mrc and mrfr, vcr and rank.
    """
    clash = "the official code has one region head (mrc or mrfr) and one choice head (vcr or rank)"
    out = names_to_official(state, VILBERT_OFFICIAL, clash)
    for name in VILBERT_FLIPPED:
        if name in out:
            out[name] = out[name].flip(0)  # (2, C) or (2,)
    return out


def vilbert_from_official(state, names):
    """An official state dict under our names, see `names_to_ours`. Accepts the prefix `module.`, TF's gamma and beta,
    and BERT's own checkpoints, for the text stream."""
    given = strip_old_names(state)
    for name in VILBERT_FLIPPED:
        if name in given:
            given[name] = given[name].flip(0)  # (2, C) or (2,)
    return names_to_ours(given, names, VILBERT_OFFICIAL)


# ---- names: LXMERT -----------------------------------------------------------------------------------------------

LXMERT_OFFICIAL = [
    ("region_embedding.features_norm", "bert.encoder.visn_fc.visn_layer_norm"),
    ("region_embedding.features", "bert.encoder.visn_fc.visn_fc"),
    ("region_embedding.boxes_norm", "bert.encoder.visn_fc.box_layer_norm"),
    ("region_embedding.boxes", "bert.encoder.visn_fc.box_fc"),
    *BERT_NAMES,
    (".text.attention.", ".lang_self_att."),  # in a cross-modality layer
    (".text.intermediate.", ".lang_inter."),
    (".text.output.", ".lang_output."),
    (".regions.attention.", ".visn_self_att."),
    (".regions.intermediate.", ".visn_inter."),
    (".regions.output.", ".visn_output."),
    (".cross.output", ".visual_attention.output.dense"),  # so called, but it serves both directions
    (".cross.norm", ".visual_attention.output.LayerNorm"),
    (".cross.", ".visual_attention.att."),
    ("language_layers.", "bert.encoder.layer."),
    ("relation_layers.", "bert.encoder.r_layers."),
    ("cross_layers.", "bert.encoder.x_layers."),
    ("pooler.", "bert.pooler."),
    ("heads.itm.", "cls.seq_relationship."),
    ("heads.regions.norm", "obj_predict_head.transform.LayerNorm"),
    ("heads.regions.", "obj_predict_head.transform."),
    ("heads.mrc.", "obj_predict_head.decoder_dict.obj."),
    ("heads.attr.", "obj_predict_head.decoder_dict.attr."),
    ("heads.mrfr.", "obj_predict_head.decoder_dict.feat."),
    ("heads.qa.", "answer_head.logit_fc."),
    ("heads.vqa.", "logit_fc."),  # a fine-tuned model has one of these three
    ("heads.ve.", "logit_fc."),
    ("heads.nlvr2.", "logit_fc."),
]

LXMERT_FROM_BERT = ("text_embedding.", "language_layers.", "pooler.")  # what BERT's weights must supply

LXMERT_HUGGING_FACE = [  # pairs (official, Hugging Face), on top of the official names
    ("lxrt_encoder.model.", ""),
    ("bert.", "lxmert."),
    ("answer_head.", ""),
    ("logit_fc.", "answer_head.logit_fc."),
]


def lxmert_to_official(state):
    """Our state dict under the official names, tied matrices listed twice, as the official code saves them.

    ValueError for two of the heads vqa, ve and nlvr2: officially they have one name.
    """
    clash = "heads vqa, ve and nlvr2 share one official name: export them from several models"
    out = names_to_official(state, LXMERT_OFFICIAL, clash)
    if not any(name.startswith("logit_fc.") for name in out):
        return out
    fine_tuned = {}
    for name, tensor in out.items():
        fine_tuned[name.replace("bert.", "lxrt_encoder.model.bert.", 1)] = tensor
    return fine_tuned


def lxmert_to_hugging_face(state):
    """Our state dict under the names of transformers' LxmertModel, ...ForPreTraining or ...ForQuestionAnswering."""
    out = {}
    for name, tensor in lxmert_to_official(state).items():
        out[rename(name, LXMERT_HUGGING_FACE)] = tensor
    return out


def lxmert_hugging_face_config(config, heads):
    """The config.json of transformers' LXMERT for a Config with these heads, which also choose its class.

    LxmertForPreTraining takes whatever pretraining heads there are if masked words and matching are among them;
    LxmertForQuestionAnswering takes one answer head; LxmertModel is the trunk alone.
    """
    if {"mlm", "itm"} <= set(heads):
        architecture = "LxmertForPreTraining"
    elif {"vqa", "qa", "ve"} & set(heads):
        architecture = "LxmertForQuestionAnswering"
    else:
        architecture = "LxmertModel"
    answers = 3 if "ve" in heads else config["answers"]
    return {
        "architectures": [architecture],
        "model_type": "lxmert",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden"],
        "num_attention_heads": config["attention_heads"],
        "intermediate_size": config["intermediate"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": config["dropout"],
        "attention_probs_dropout_prob": config["dropout"],
        "max_position_embeddings": config["max_positions"],
        "type_vocab_size": config["types"],
        "l_layers": config["language_layers"],
        "r_layers": config["relation_layers"],
        "x_layers": config["cross_layers"],
        "visual_feat_dim": config["feature_size"],
        "visual_pos_dim": 4,
        "num_qa_labels": answers,
        "num_object_labels": config["classes"] - 1,  # ours counts background
        "num_attr_labels": config["attributes"],
        "task_mask_lm": "mlm" in heads,
        "task_matched": "itm" in heads,
        "task_obj_predict": bool({"mrc", "attr", "mrfr"} & set(heads)),
        "task_qa": "qa" in heads,
        "visual_obj_loss": "mrc" in heads,
        "visual_attr_loss": "attr" in heads,
        "visual_feat_loss": "mrfr" in heads,
    }


# beginnings of the names that each class of transformers has
LXMERT_HUGGING_FACE_HEADS = {
    "LxmertForPreTraining": ("lxmert.", "cls.", "obj_predict_head.", "answer_head."),
    "LxmertForQuestionAnswering": ("lxmert.", "answer_head."),
    "LxmertModel": ("lxmert.",),
}


def lxmert_from_official(state, names):
    """An official or Hugging Face state dict under our names, see `names_to_ours`. Accepts the prefixes `module.` and
    `lxrt_encoder.model.` and TF's gamma and beta."""
    given = {}
    for name, tensor in strip_old_names(state).items():
        name = name.removeprefix("lxrt_encoder.model.")
        if name.startswith(("lxmert.", "embeddings.", "encoder.", "pooler.")):  # Hugging Face, with heads or without
            name = "bert." + name.removeprefix("lxmert.")
        given[name] = tensor
    return names_to_ours(given, names, LXMERT_OFFICIAL)


# ---- sizes from a state dict -------------------------------------------------------------------------------------


def shape_of(state, ending, default=None):
    """The shape of the one parameter whose name ends in `ending`, whatever stands before it; else `default`.
    KeyError without either."""
    for name, tensor in state.items():
        if name.endswith(ending):
            return tuple(tensor.shape)
    if default is None:
        raise KeyError(ending)
    return default


def has_name(state, part):
    """Whether the name of any parameter contains `part`."""
    return any(part in name for name in state)


def count_layers(state, stack):
    """How many layers a state dict has under `stack`, e.g. "encoder.layer.": the different numbers that follow it."""
    return len({name.split(stack, 1)[1].split(".")[0] for name in state if stack in name})


def text_sizes(state, config):
    """The Config fields that every one of the official state dicts, and BERT's, determines: those of the text.

    config: what the file's config.json says, {} without one. The number of heads is in no weight: it is taken from
    there, else heads are 64 wide, as in every published size but MiniLM's. ValueError if the width does not allow it.
    """
    vocab_size, hidden = shape_of(state, "embeddings.word_embeddings.weight")
    heads = config.get("num_attention_heads")
    if heads is None and hidden % 64 == 0:
        heads = hidden // 64
    if type(heads) is not int or heads < 1 or hidden % heads:
        raise ValueError(f"{hidden} wide with {heads or 'an unknown number of'} heads; put its config.json beside it")
    return {
        "vocab_size": vocab_size,
        "hidden": hidden,
        "attention_heads": heads,
        "intermediate": shape_of(state, "encoder.layer.0.intermediate.dense.weight")[0],
        "max_positions": shape_of(state, "embeddings.position_embeddings.weight")[0],
        "types": shape_of(state, "embeddings.token_type_embeddings.weight")[0],
    }


def uniter_sizes_of(state, config):
    """Config fields that an official state dict, or BERT's, determines (section 3.1: the trunk starts as BERT, whole;
    the masked-word head too). config: as in `text_sizes`. KeyError names what is lacking, ValueError tells why.
    """
    sizes = text_sizes(state, config)
    sizes["layers"] = count_layers(state, "encoder.layer.")
    if has_name(state, "img_embeddings."):
        sizes["feature_size"] = shape_of(state, "img_embeddings.img_linear.weight")[1]  # (C, F)
        sizes["classes"] = shape_of(state, "region_classifier.net.3.weight", (uniter.Config.classes,))[0]
    if has_name(state, "nlvr2_output.weight"):
        if has_name(state, "attn1."):
            sizes["nlvr2"] = "paired-attention"
        elif shape_of(state, "nlvr2_output.weight")[1] > sizes["hidden"]:  # (2, 2C), of two vectors, or (2, C)
            sizes["nlvr2"] = "paired"
        else:
            sizes["nlvr2"] = "triplet"
    if has_name(state, "re_output.3."):
        sizes["refer_layers"] = 2
    return sizes


def vilbert_sizes_of(state, config):
    """Config fields that an official state dict, or BERT's, determines (section 3.1: BERT is the text stream, with the
    masked-word head; all else starts at random). BERT's file says nothing of the visual stream, which then gets the
    paper's proportions: half as deep, 4/3 as wide, heads of width 128, co-attention with the last text layers.

    config: as in `text_sizes`. KeyError names what is lacking, ValueError tells why.
    """
    sizes = text_sizes(state, config)
    layers = count_layers(state, "encoder.layer.")
    if has_name(state, "v_embeddings."):
        visual, features = shape_of(state, "v_embeddings.image_embeddings.weight")  # (C, F)
        shared = shape_of(state, "t_pooler.dense.weight")[0]
        depth = count_layers(state, "encoder.v_layer.")
        connected = count_layers(state, "encoder.c_layer.")
        sizes["feature_size"] = features
        sizes["visual_intermediate"] = shape_of(state, "encoder.v_layer.0.intermediate.dense.weight")[0]
        sizes["classes"] = shape_of(state, "cls.imagePredictions.decoder.weight", (vilbert.Config.classes,))[0]
        sizes["gqa_answers"] = shape_of(state, "vil_prediction_gqa.logit_fc.3.weight", (vilbert.Config.gqa_answers,))[0]
        sizes["twelve_in_one"] = has_name(state, "vil_prediction.logit_fc.")
        sizes["task_tokens"] = shape_of(state, "embeddings.task_embeddings.weight", (0,))[0]
        sizes["dynamic_attention"] = has_name(state, "dyLinear_q.")
    else:
        depth = max(1, layers // 2)
        connected = depth
        visual = 128 * max(1, round(sizes["hidden"] / 96))
        shared = visual
        sizes["visual_intermediate"] = visual
    sizes["layers"] = layers
    sizes["visual_hidden"] = visual
    sizes["visual_layers"] = depth
    sizes["shared"] = shared
    sizes["visual_heads"] = config.get("v_num_attention_heads", max(1, visual // 128))
    sizes["shared_heads"] = config.get("bi_num_attention_heads", max(1, shared // 128))
    visual_layers = config.get("v_biattention_id", range(connected))
    text_layers = config.get("t_biattention_id", range(layers - connected, layers))
    sizes["connections"] = tuple(zip(visual_layers, text_layers, strict=True))
    return sizes


def lxmert_sizes_of(state, config):
    """Config fields that an official or Hugging Face state dict, or BERT's, determines. BERT's first layers become the
    language layers (9 of 12), its pooler, masked-word and next-sentence heads their namesakes here; its other layers
    are not used, and the rest starts at random (official `--fromScratch` off). The paper's 9, 5 and 5 layers are
    three quarters and five twelfths of BERT-base's 12: other BERTs are divided alike.

    config: as in `text_sizes`. KeyError names what is lacking, ValueError tells why.
    """
    sizes = text_sizes(state, config)
    depth = count_layers(state, "encoder.layer.")
    if has_name(state, "visn_fc."):
        sizes["language_layers"] = depth
        sizes["relation_layers"] = count_layers(state, "encoder.r_layers.")
        sizes["cross_layers"] = count_layers(state, "encoder.x_layers.")
        sizes["feature_size"] = shape_of(state, "visn_fc.visn_fc.weight")[1]  # (C, F)
        sizes["classes"] = 1 + shape_of(state, "decoder_dict.obj.weight", (lxmert.Config.classes - 1,))[0]
        sizes["attributes"] = shape_of(state, "decoder_dict.attr.weight", (lxmert.Config.attributes,))[0]
    else:
        sizes["language_layers"] = max(1, depth * 3 // 4)
        sizes["relation_layers"] = max(1, depth * 5 // 12)
        sizes["cross_layers"] = max(1, depth * 5 // 12)
    return sizes


@dataclass(frozen=True)
class Format:
    """What is known of a paper's official checkpoints."""

    mark: str  # part of a name that only this paper's state dicts have
    to_official: Callable  # our state dict -> the official one
    from_official: Callable  # official state dict, our names -> our state dict, unexpected names
    from_bert: tuple  # beginnings of our names whose tensors BERT's weights must supply
    sizes_of: Callable  # state dict, config.json -> fields of the model's Config
    hugging_face: tuple = ()  # where transformers has the model: to its names, to its config, names of each class


FORMATS = {
    "uniter": Format("img_embeddings.", uniter_to_official, uniter_from_official, UNITER_FROM_BERT, uniter_sizes_of),
    "vilbert": Format("v_embeddings.", vilbert_to_official, vilbert_from_official, VILBERT_FROM_BERT, vilbert_sizes_of),
    "lxmert": Format(
        "visn_fc.",
        lxmert_to_official,
        lxmert_from_official,
        LXMERT_FROM_BERT,
        lxmert_sizes_of,
        (lxmert_to_hugging_face, lxmert_hugging_face_config, LXMERT_HUGGING_FACE_HEADS),
    ),
}


def export_official(model, state):
    """A model's weights under its paper's official names. UserError where two heads have one official name."""
    if model not in FORMATS:
        raise UserError(f"{model} has no official names")
    try:
        return FORMATS[model].to_official(state)
    except ValueError as error:
        raise UserError(f"no official names for these weights: {error}") from None


def export_hugging_face(model, config, state):
    """(state dict, config.json) of a model as transformers' `from_pretrained` wants them, without a tensor that its class
    has no place for. UserError for models that transformers lacks."""
    if model not in FORMATS or not FORMATS[model].hugging_face:
        raise UserError(f"transformers has no {model}; export it under the official names")
    to_names, to_config, names_of_class = FORMATS[model].hugging_face
    described = to_config(config, config["heads"])
    kept = names_of_class[described["architectures"][0]]
    try:
        renamed = to_names(state)
    except ValueError as error:
        raise UserError(f"no official names for these weights: {error}") from None
    out = {}
    for name, tensor in renamed.items():
        if name.startswith(kept):
            out[name] = tensor
    return out, described
