"""The settings of every model. Each reading of a paper is declared here, once: choices, default, literal value.

`Config` checks the values when a config is made. The table of readings in a lesson, the comments of the parameters of
`2_train` and `reading="literal"` come from these declarations. Importing this file imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from finematch.config import Config, setting, switch


@dataclass(frozen=True)
class MVAMConfig(Config):
    """Settings of `models.mvam.MVAM`."""

    pooling: str = setting(
        "mvam", {"cls", "mean", "attention", "mvam"}, "how token states are pooled to one vector"
    )
    views: int = setting(16, (1, 256), "number of view codes")
    total_dim: int = setting(1024, (1, 65536), "width of the image vector and of the caption vector")
    projection: str = switch(
        "M1", "split", "shared", "full",
        says="width of C lost; +Attn projects to 1024 before attention",
        help="linear layer before the views",
    )  # fmt: skip
    view_dim: int = setting(64, (1, 4096), "width of a view where projection is shared")
    scoring: str = switch(
        "M2",
        "dot",
        "scaled",
        "tanh",
        says="'codes as queries', as in Poly-encoders",
        help="score of a code and a token (Eq. 7)",
    )
    include_special: bool = switch(
        "M3", True, False, says="does not say whether [IMG], [CLS], [SEP] are attended",
        help="views may attend to [IMG], [CLS] and [SEP]",
    )  # fmt: skip
    diversity: str = setting("base", {"base", "sqrt", "none"}, "diversity loss (Eq. 10, Eq. 11)")
    diversity_weight: float = setting(
        10.0, (0, 1e6), "weight lambda of the diversity loss", register="-", literal=10.0,
        says="10 (4.4); at our small scales, from scratch, that weight ends at chance")  # fmt: skip
    diversity_power: int = switch(
        "M4",
        2,
        1,
        says="'Frobenius norm'; SAN squares it, DRSA's code does not",
        help="power of the norm of Eq. 10-11",
    )
    diversity_reduce: str = switch(
        "M4",
        "mean",
        "sum",
        says="batch reduction not given",
        help="reduction of the diversity loss over the batch",
    )
    reduction: str = switch(
        "M5", "mean", "sum", says="Eq. 6 lost; CLIP halves the sum", help="how Eq. 6 joins its two directions"
    )
    normalise: str = switch(
        "M6",
        "after",
        "per_view",
        says="'concatenated for matching'",
        help="where vectors are scaled to unit length",
    )
    tau: float = setting(
        0.07,
        (0.01, 10),
        "initial temperature, learnable",
        register="M7",
        literal=0.07,
        says="'following CLIP'",
    )
    same_picture_positives: bool = switch(
        "M11", False, True, says="in-batch negatives, literally the diagonal",
        help="other captions of the same image are positives",
    )  # fmt: skip


# fmt: off
@dataclass(frozen=True)
class HSLMConfig(Config):
    """Settings of `models.hslm.HSLM`; the first five are the switches of Table 4."""

    mgcn: bool = setting(True, None, "graph convolution of regions and of words")
    self_attn: bool = setting(True, None, "self-attention of the words")
    cross_attn: bool = setting(True, None, "words guide the regions")
    glob: bool = setting(True, None, "global alignment")
    loc: bool = setting(True, None, "local alignment")
    width: int = setting(1024, (1, 8192), "d_1, width of the joint space")
    embed: int = setting(300, (1, 8192), "d_2, width of the word embeddings")
    sim: int = setting(256, (1, 8192), "width of a similarity vector")
    depth: int = setting(4, (0, 48), "layers of the graph convolution; 0 is the identity")
    self_attention: str = switch(
        "H1", "word", "channel", "softmax",
        says="Eq. 6 multiplies three matrices that do not conform; the text filters words",
        help="how Eq. 6 relates the words")
    self_residual: bool = switch(
        "H2", True, False, literal=False, says="Eq. 6 has no residual, so words become mixtures of one another",
        help="residual connection in Eq. 6")
    relation: str = switch(
        "H4", "nodes", "raw", "softmax",  # raw words are infinite after 2 to 4 steps at the paper's widths (lr 2e-4)
        says="Eq. 7-8 do not normalise A, which then overflows; the cited VSRN divides by the nodes",
        help="normalisation of A (Eq. 7-8)")
    graph_norm: str = switch(
        "H5", "none", "layer", "batch", says="no normalisation in Eq. 8-9; VSRN's code has one of the batch",
        help="norm after W_r")
    normalise_graph: bool = switch(
        "H9", False, True, says="does not say where vectors are made unit",
        help="scale regions to unit length after the graph")
    cross: str = switch(
        "H10", "attend", "gate",
        says="Eq. 15-16 call a product of M x d and N x d a dot product; scores for each pair",
        help="how words and regions meet in Eq. 15")
    gate_pool: str = switch(
        "H10", "mean", "max", says="how a region's gate gathers the words' scores",
        help="how a region's gate pools the words' scores, for gate")
    cross_scale: float = setting(
        1.0, (0, 1e6), "factor inside the sigmoid of Eq. 16", register="H10", literal=1.0,
        says="Eq. 16 has no temperature")
    context_norm: bool = switch(
        "H11", True, False, literal=False, says="the weights of Eq. 15 do not sum to one",
        help="scale the contexts of Eq. 15 to unit length")
    node_gate: str = switch(
        "H16", "scalar", "element", says="Eq. 21 calls it a dot product", help="shape of the gates of Eq. 21")
    node_weights: str = switch(
        "H16", "raw", "l1", says="SGRAF, on which 3.5 builds, makes the gates sum to one",
        help="normalisation of the gates of Eq. 21")
    loss_score: str = switch(
        "H17", "sigmoid", "logit", literal="logit",
        says="Eq. 22 ends with FC; SGRAF adds a sigmoid. The logit ranks",
        help="score in the loss (Eq. 23)")
    include_special: bool = switch(
        "H24", True, False, says="whether the marks of start and end count as words",
        help="[CLS] and [SEP] count as words")
    margin: float = setting(0.2, (1e-6, 100), "margin of the loss, beta of Eq. 23")
    negatives: str = setting(
        "hardest", {"hardest", "mean", "random", "contrastive"},
        "negatives of Eq. 23")
    start: str = setting(
        "contrastive", {"random", "contrastive"}, "negatives of `warmup_epochs`", register="H26",
        literal="random",
        says="nothing about a start (literal: warmup_epochs=0); the hinge on hardest negatives plateaus")
    start_scale: float = setting(10.0, (1e-6, 1e6), "factor on the scores of the contrastive loss")
    rivals: int = setting(
        0, (0, 65536), "hardest of so many random negatives; 0: of the batch", register="H26", literal=0,
        says="hard negatives in each mini-batch")
    dropout: float = setting(
        0.0, (0, 0.95), "dropout of the word embeddings", register="H27", literal=0.0, says="nothing about dropout")
    input_dropout: float = setting(
        0.0, (0, 0.95), "share of the region features' channels that an image loses in a step", register="H27",
        literal=0.0, says="nothing about dropout; few images with frozen features are soon learned by heart")

    @property
    def layers(self) -> int:
        """Layers of the graph convolution, none without the module."""
        return self.depth if self.mgcn else 0


@dataclass(frozen=True)
class FELGAConfig(Config):
    """Settings of `models.felga.FELGA`."""

    labels: str = setting("dynamic", {"dense", "sparse", "dynamic"}, "pseudo-labels (Eq. 3, 4, 6)")
    alignment: str = setting(
        "both", {"local", "global", "both"}, "losses: local (Eq. 10), global (Eq. 12) or both (Eq. 13)")
    label_features: str = switch(
        "F9", "frozen", "online", says="Eq. 4-6 compare f, not f-hat; yet 'dynamically construct'",
        help="features that Eq. 4-6 compare")
    fenet: str = switch(
        "F12", "shared", "separate", says="Eq. 8 has one symbol for both modalities",
        help="one FENet for both modalities, or one each")
    hidden_dim: int = setting(4096, (1, 65536), "hidden width of FENet")
    out_dim: int = setting(512, (1, 65536), "width of the embeddings")
    dropout: float = setting(0.2, (0, 0.95), "dropout in FENet")
    input_scale: str = switch(
        "F13", "rms", "unit", says="does not say how long the vectors are that FENet takes",
        help="length of the vectors that FENet takes")
    activation: str = switch(
        "F13", "between", "every",
        says="one ReLU and one dropout between every two layers; Eq. 9's range [0, 1] needs a ReLU after the last too",
        help="place of ReLU and dropout in FENet")
    loss: str = switch(
        "F1", "anchor", "batch", "pair", literal="batch", says="the sums inside Eq. 10 and 12 have no free index",
        help="over what Eq. 10 and 12 sum")
    literal_scale: bool = switch(
        "F1", False, True,
        says="the outer sums of Eq. 10 and 12, under which nothing depends on i, j; training at lr 0.1 then diverges",
        help="keep the outer sums of Eq. 10 and 12, for batch alone")
    hinge: bool = switch(
        "F2", False, True, says="'inspired by the Lifted Structured Loss', which has one",
        help="use the hinge of the lifted structured loss")
    tau: float = setting(
        1.0, (1e-6, 1000), "temperature of the losses", register="F4", literal=1.0, says="e^d without a temperature")
    empty: str = switch(
        "F5", "skip", "keep", says="does not say what a row without positives adds",
        help="fragments without positives or negatives")
    lambda1: float = setting(0.5, (-100, 100), "margin of Eq. 10; no gradient without hinge")
    lambda2: float = setting(0.5, (-100, 100), "margin of Eq. 12; no gradient without hinge")
    lambda3: float = setting(0.2, (0, 1000), "weight of the global loss in Eq. 13")
    global_negatives: str = switch(
        "F26", "distinct", "all", literal="all",
        says="all other texts, though where they share a keyword the best fragments often belong together",
        help="negatives of Eq. 12")
    same_keyword_positives: bool = switch(
        "F10", False, True, says="Eq. 3-6 literally; section 5 regrets it",
        help="the same keyword in other texts is a positive")


@dataclass(frozen=True)
class LocatorConfig(Config):
    """Settings of `models.slan.locator.SelfLocator` (SLAN 3.2). `width` is the objective's as well."""

    width: int = setting(768, (1, 4096), "width D of all tokens")
    levels: int = setting(3, (0, 12), "number of region adaptors, L")
    decoder_levels: int = setting(3, (1, 12), "maps of the vision decoder, which the proposals read")
    pyramid: int = setting(256, (1, 4096), "channels of the decoder's maps")
    scales: tuple = setting((), None, "scales of a plain ViT's pyramid, coarse to fine; empty: 1/2, 1, 2 ...")
    source: str = switch(
        "A.3", "decoder", "encoder", says="arXiv, Table 10: where the maps of all levels come from",
        help="source of the feature maps of all levels")
    proposals: str = switch(
        "S28", "rpn", "queries", says="ICCV: region proposal network; arXiv: DETR",
        help="source of the region proposals")
    count: int = setting(100, (1, 10000), "proposals per image")
    anchor: float = setting(8.0, (0.01, 1000), "side of an anchor, in cells of its map (paper: at 224 px)")
    anchor_offset: float = setting(0.5, (0, 1), "place of an anchor in its cell; 0: as in torchvision")
    nms: float = setting(
        0.0, (0, 0.99), "IoU of non-maximum suppression; 0: none", register="S16", literal=0.0,
        says="nothing about suppression of proposals that no label trained")
    query_depth: int = setting(6, (1, 48), "layers of the query Transformer")
    query_heads: int = setting(8, (1, 64), "attention heads of the query Transformer")
    frozen: bool = setting(False, None, "the proposals are not trained (Table 6, row 1)")
    top: int = setting(10, (0, 1000), "regions that the filter keeps, T; 0 keeps all")
    threshold: float = setting(0.5, (0, 0.999), "lowest score that the filter keeps, h")
    score_norm: str = switch(
        "S17", "max", "minmax", "sigmoid", says="arXiv: 'with the maximum value 1'; ICCV: in [0, 1]",
        help="normalisation of the filter's scores")
    filter_text: bool = switch(
        "S19", False, True, says="the filter is conditioned on texts (abstract), not so in Algorithm 1",
        help="the filter reads the text")
    weighting: bool = setting(True, None, "the filter's scores weight the region embeddings")
    first: str = switch(
        "S10", "encoder", "decoder", says="E^G_1 from V (3.2), from F_i in Algorithm 1",
        help="source of the first level's E^G_1")
    heads: int = setting(8, (1, 64), "attention heads of the adaptors")
    dropout: float = setting(0.0, (0, 0.95), "dropout of the adaptors' attention")
    attn: str = switch(
        "S1", "transformer", "literal", literal="literal",
        says="names multi-head attention; Eq. 1 is one head without projections",
        help="attention of Eq. 1")
    region_update: str = switch(
        "S2", "residual", "overwrite", "reweight", literal="overwrite",
        says="Algorithm 1 overwrites (line 9) what line 5 made", help="Alg. 1")
    axes: str = switch(
        "S3", "image", "paper", literal="paper", says="Eq. 2 moves x by the cell's row and y by its column",
        help="order of the axes in Eq. 2")
    unit: str = switch(
        "S5", "N/K", "N", literal="N",
        says="Eq. 2 multiplies by the whole neighbourhood's size; cells stand N/K apart",
        help="unit of the shifts of Eq. 2")
    extent: str = switch(
        "S6", "region", "map", literal="map", says="H_i and W_i: those of the map (Table 1), or of each region",
        help="what gives a neighbourhood its H and W")
    steer: str = switch(
        "S41", "unimodal", "fused", literal="fused",
        says="E^T_{i+1} steers level i; words that met regions are no longer the text's",
        help="words that M of Eq. 2 compares with")
    k: int = setting(
        3, (1, 15), "cells of a neighbourhood per side; odd", register="S7", literal=3,
        says="gives K in an example only")
    ratios: tuple = setting((), None, "ratio r of each level, with commas; empty: 1, 1/2, 1/4 ...")
    cell_weights: str = switch(
        "S8", "softmax", "raw", "relu", literal="raw",
        says="a weighted summation whose weights M_j are not normalised",
        help="normalises M of Eq. 2")
    cell_tau: float = setting(0.07, (1e-6, 100), "temperature of the softmax of M")
    outside: str = switch(
        "S8", "mean", "keep", says="nothing about cells of a neighbourhood that lie outside the image",
        help="treatment of cells outside the image")
    include_special: bool = switch(
        "S9", False, True, says="all word embeddings; whether [CLS] and [SEP] are words",
        help="[CLS] and [SEP] count as words")
    scaling: str = switch(
        "S11", "rank", "query", "level", "predicted", says="p_w, p_h belong to regions, which differ by image",
        help="what factors p_w, p_h belong to")
    smallest: float = setting(1 / 32, (1e-6, 0.5), "smallest side of a box, as a share of the image's")
    box_grad: bool = switch(
        "S12", True, False, says="nothing; the usual RoIAlign gives boxes no gradient",
        help="gradients reach the boxes")
    roi: str = switch(
        "-", "align", "table", says="RoIAlign, then average pooling; the table is the exact mean",
        help="implementation of RoI pooling")
    samples: int = setting(14, (1, 64), "sampling points of RoIAlign per side")
    embed_norm: str = switch(
        "-", "layer", "none", literal="none", says="no normalisation of region embeddings",
        help="normalisation of region embeddings")
    target: str = switch(
        "S28", "mean", "weighted", says="Eq. 3 is the mean; arXiv's text has a 'weighted summation'",
        help="regression target of Eq. 3")
    detach_target: bool = switch(
        "S13", True, False, says="the mean of the updated regions is 'taken as ground truth'",
        help="the target of Eq. 3 is held fixed")
    reg_reduction: str = switch(
        "S14", "sum", "mean", says="summation for all regions; weights l1_weight, giou_weight not given",
        help="reduction of Eq. 3 over regions")
    reg_part: str = switch(
        "S41", "box", "centre", says="Eq. 3 is of (x, y, w, h); scaled sides have no optimum",
        help="what Eq. 3 compares")
    l1_weight: float = setting(
        1.0, (0, 100), "weight of the L1 term of Eq. 3", register="S14", literal=1.0,
        says="Eq. 3 has no weights; DETR has 5 and 2")
    giou_weight: float = setting(
        1.0, (0, 100), "weight of the GIoU term of Eq. 3", register="S14", literal=1.0,
        says="Eq. 3 has no weights; DETR has 5 and 2")
    token: str = switch(
        "S20", "map", "regions", says="T_v is the mean of V (ICCV) or of the region embeddings (arXiv)",
        help="image token T_v of the contrast")
    fused: str = switch(
        "S20", "regions", "map", says="T_v of the last level (Algorithm 1), or of V (3.2, ICCV)",
        help="image token T_v of the matching head")


@dataclass(frozen=True)
class LocalizationConfig(Config):
    """Settings of `models.slan.detection.Localizer` (SLAN 4.3, Table 4)."""

    label_score: str = switch(
        "S35", "mean", "max", says="does not say how the words of a class name become one score; its rival GLIP: mean",
        help="a class's score of a region, from those of its words")
    phrase_score: str = switch(
        "S36", "max", "mean", says="does not say how the words of a phrase become one score; MDETR: max",
        help="a phrase's score of a region, from those of its words")
    align: str = switch(
        "S35", "steering", "fused", says="'We adopt the output from the last layer of the' ends there",
        help="words that a region is compared with")
    top: int = setting(
        100, (0, 1000), "regions that the filter keeps for detection, T; 0 keeps all", register="S35", literal=10,
        says="T = 10 (Table 7), with which COCO's AP, which counts 100 boxes, is capped")
    threshold: float = setting(
        0.0, (0, 0.999), "lowest score that the filter keeps for detection, h", register="S35",
        literal=0.5, says="h = 0.5 (Table 7)")
    suppress: float = setting(
        0.5, (0, 0.99), "IoU of non-maximum suppression of a class's boxes; 0: none", register="S35",
        says="nothing about boxes that overlap; GLIP suppresses them")
    align_weight: float = setting(1.0, (0, 1000), "weight of the alignment loss of fine-tuning")
    box_weight: float = setting(1.0, (0, 1000), "weight of the box loss of fine-tuning")
    proposal_weight: float = setting(1.0, (0, 1000), "weight of the proposals' own loss of fine-tuning")


@dataclass(frozen=True)
class CaptioningConfig(Config):
    """Settings of `models.slan.captioning.Captioner` (SLAN 4.2.2, Table 3)."""

    locator_text: str = switch(
        "S31", "prompt", "none", says="nothing about the locator's text while there is no caption; BLIP has a prompt",
        help="text of the locator when captions are written")
    smoothing: float = setting(0.1, (0, 0.9), "label smoothing of the loss (BLIP)")
    beams: int = setting(3, (1, 20), "beams of the search for a caption (BLIP)")
    max_length: int = setting(20, (5, 64), "most tokens of a caption and its prompt (BLIP)")
    min_length: int = setting(5, (1, 64), "fewest tokens of a caption and its prompt (BLIP)")


@dataclass(frozen=True)
class AnsweringConfig(Config):
    """Settings of `models.slan.vqa.Answerer` (SLAN 4.2.3, Table 3)."""

    choose: str = switch(
        "S32", "rank", "generate", says="'open-ended' generation, following BLIP, which ranks a list of answers",
        help="the answer: likeliest of a list, or written word by word")
    answers: int = setting(3128, (1, 100000), "answers in the list, the most frequent of train")
    candidates: int = setting(128, (1, 100000), "answers scored whole, those whose first word is likeliest")


@dataclass(frozen=True)
class VideoConfig(Config):
    """Which frames of a video stand for it (SLAN 4.2.5, Table 5)."""

    frames: int = setting(8, (1, 1000), "frames of a video, m", register="S34", says="m has no value; BLIP: 8")
    sample: str = switch(
        "S34", "uniform", "random", literal="random",
        says="'randomly select m frames': a number then depends on the draw", help="which frames are looked at")


@dataclass(frozen=True)
class SLANConfig(Config):
    """Settings of `models.slan.objective.SLAN` (3.3). A term of weight 0 is not computed, and its head is not made."""

    width: int = setting(768, (1, 4096), "width D of all tokens")
    itc_weight: float = setting(
        1.0, (0, 100), "weight of the contrast", register="S37", literal=1.0,
        says="Eq. 8-9 have no weights")
    itm_weight: float = setting(
        1.0, (0, 100), "weight of matching", register="S37", literal=1.0,
        says="Eq. 8-9 have no weights")
    mlm_weight: float = setting(
        1.0, (0, 100), "weight of masked words", register="S37", literal=1.0, says="Eq. 8-9 have no weights")
    reg_weight: float = setting(
        1.0, (0, 100), "weight of Eq. 3", register="S37", literal=1.0,
        says="Eq. 8-9 have no weights")
    region_word: float = setting(
        1.0, (0, 100), "weight of the region-word contrast", register="S41", literal=0.0,
        says="no loss trains the cosine of a region and a word, by which Eq. 2 moves regions")
    contrast: str = switch(
        "S20", "unimodal", "fused", says="Eq. 5 compares T_v and T_t; Algorithm 1 ends with others",
        help="tokens of the contrast")
    embed: int = setting(
        256, (0, 65536), "width of the contrast's vectors; 0: the tokens'", register="S37",
        says="a dot product of D-d tokens; ALBEF projects them to 256, and makes them unit vectors, as we always do")
    queue: int = setting(
        65536, (0, 2**20), "pairs in the contrast's queues; 0: the batch alone", register="S21",
        says="'two queues', of no stated size")
    momentum: float = setting(
        0.995, (0, 0.99999), "decay of the momentum encoders; 0: none", register="S21",
        says="does not name momentum encoders; ALBEF has them")
    distil: float = setting(
        0.0, (0, 0.99), "share of momentum distillation", register="S22", literal=0.0,
        says="no momentum distillation; ALBEF has it")
    same_picture: bool = switch(
        "S21", True, False, literal=False,
        says="one positive a pair; ALBEF counts all captions of the image when it fine-tunes",
        help="captions of one image are all positives")
    reduction: str = switch(
        "S22", "sum", "mean", says="Eq. 6 sums the directions; ALBEF averages them",
        help="how Eq. 6 joins its two directions")
    tau: float = setting(
        0.07, (0.001, 0.5), "initial temperature of the contrast", register="S21", literal=0.07,
        says="'a temperature parameter'")
    learnable_tau: bool = setting(True, None, "the temperature is trained")
    mask_share: float = setting(0.15, (0.001, 0.999), "share of the words that are masked")
    mlm: str = switch(
        "S25", "positions", "pooled", literal="pooled",
        says="p_mask(T_v, T_t): two vectors cannot tell positions apart", help="what predicts masked words")
    mlm_picture: bool = switch(
        "S25", True, False, says="whether T_v joins the word's own state", help="T_v joins the masked word's state")
    match_score: str = switch(
        "4.1", "odds", "logit", says="not how pairs are ranked; ALBEF takes the logit of 'matched' alone",
        help="how the matching head scores a pair")

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms of Eq. 8-9."""
        return {"itc": self.itc_weight, "itm": self.itm_weight, "mlm": self.mlm_weight, "reg": self.reg_weight,
                "word": self.region_word}
