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
        "mvam", {"cls", "mean", "attention", "mvam"}, "what makes one vector of the tokens"
    )
    views: int = setting(16, (1, 256), "number of view codes")
    total_dim: int = setting(1024, (1, 65536), "width of the vector")
    projection: str = switch(
        "M1", "split", "shared", "full",
        says="width of C lost; +Attn projects to 1024 before attention",
        help="the layer before the views",
    )  # fmt: skip
    view_dim: int = setting(64, (1, 4096), "width of a view where projection is shared")
    scoring: str = switch(
        "M2",
        "dot",
        "scaled",
        "tanh",
        says="'codes as queries', as in Poly-encoders",
        help="code times token",
    )
    include_special: bool = switch(
        "M3", True, False, says="does not say whether [IMG], [CLS], [SEP] are attended",
        help="attend to [IMG], [CLS] and [SEP]",
    )  # fmt: skip
    diversity: str = setting("base", {"base", "sqrt", "none"}, "diversity loss (Eq. 10, Eq. 11)")
    diversity_weight: float = setting(10.0, (0, 1e6), "lambda of Eq. 13")
    diversity_power: int = switch(
        "M4",
        2,
        1,
        says="'Frobenius norm'; SAN squares it, DRSA's code does not",
        help="power of the norm of Eq. 10-11",
    )
    diversity_reduce: str = switch(
        "M4", "mean", "sum", says="batch reduction not given", help="diversity loss over the batch"
    )
    reduction: str = switch(
        "M5", "mean", "sum", says="Eq. 6 lost; CLIP halves the sum", help="the two directions of Eq. 6"
    )
    normalise: str = switch(
        "M6",
        "after",
        "per_view",
        says="'concatenated for matching'",
        help="unit length",
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
    width: int = setting(1024, (1, 8192), "d_1, the joint space")
    embed: int = setting(300, (1, 8192), "d_2, the word embeddings")
    sim: int = setting(256, (1, 8192), "width of a similarity vector")
    depth: int = setting(4, (0, 48), "layers of the graph convolution; 0 is the identity")
    self_attention: str = switch(
        "H1", "word", "channel", "softmax",
        says="Eq. 6 multiplies three matrices that do not conform; the text filters words",
        help="relations of Eq. 6")
    self_residual: bool = switch("H2", False, True, says="Eq. 6 has no residual", help="add E to Eq. 6")
    relation: str = switch(
        "H4", "nodes", "raw", "softmax", literal="raw",
        says="Eq. 7-8 do not normalise A; the cited VSRN divides by the nodes", help="normalisation of A")
    graph_norm: str = switch(
        "H5", "none", "layer", "batch", says="no normalisation in Eq. 8-9; VSRN's code has one of the batch",
        help="after W_r")
    normalise_graph: bool = switch(
        "H9", False, True, says="does not say where vectors are made unit", help="unit regions after the graph")
    cross: str = switch(
        "H10", "attend", "gate", says="Eq. 15-16 call a product of M x d and N x d a dot product; scores for each pair",
        help="reading of Eq. 15")
    gate_pool: str = switch(
        "H10", "mean", "max", says="how a region's gate gathers the words' scores", help="of the scores, for gate")
    cross_scale: float = setting(
        1.0, (0, 1000), "factor inside the sigmoid of Eq. 16", register="H10", literal=1.0,
        says="Eq. 16 has no temperature")
    context_norm: bool = switch(
        "H11", True, False, literal=False, says="the weights of Eq. 15 do not sum to one", help="unit contexts")
    node_gate: str = switch(
        "H16", "scalar", "element", says="Eq. 21 calls it a dot product", help="gates of Eq. 21")
    node_weights: str = switch(
        "H16", "raw", "l1", says="SGRAF, on which 3.5 builds, makes the gates sum to one", help="sum of the gates")
    loss_score: str = switch(
        "H17", "sigmoid", "logit", literal="logit",
        says="Eq. 22 ends with FC; SGRAF adds a sigmoid. The logit ranks", help="what Eq. 23 compares")
    include_special: bool = switch(
        "H24", True, False, says="whether <start> and <end> count as words", help="[CLS] and [SEP] count as words")
    margin: float = setting(0.2, (1e-6, 100), "beta of Eq. 23")
    negatives: str = setting("hardest", {"hardest", "mean", "random"}, "negatives of Eq. 23")
    rivals: int = setting(
        0, (0, 65536), "random rivals; 0 is the batch", register="H26", literal=0,
        says="hard negatives in each mini-batch")
    dropout: float = setting(0.0, (0, 0.95), "of the word embeddings")

    @property
    def layers(self) -> int:
        """Layers of the graph convolution, none without the module."""
        return self.depth if self.mgcn else 0


@dataclass(frozen=True)
class FELGAConfig(Config):
    """Settings of `models.felga.FELGA`."""

    labels: str = setting("dynamic", {"dense", "sparse", "dynamic"}, "pseudo-labels (Eq. 3, 4, 6)")
    alignment: str = setting("both", {"local", "global", "both"}, "Eq. 10, Eq. 12, Eq. 13")
    label_features: str = switch(
        "F9", "frozen", "online", says="Eq. 4-6 compare f, not f-hat; yet 'dynamically construct'",
        help="features that Eq. 4-6 compare")
    fenet: str = switch(
        "F12", "shared", "separate", says="Eq. 8 has one symbol for both modalities", help="FENets of both modalities")
    hidden_dim: int = setting(4096, (1, 65536), "of FENet")
    out_dim: int = setting(512, (1, 65536), "of the embeddings")
    dropout: float = setting(0.2, (0, 0.95), "in FENet")
    input_scale: str = switch(
        "F13", "rms", "unit", "raw", says="does not say how long the vectors are that FENet takes",
        help="length of what FENet takes")
    loss: str = switch(
        "F1", "anchor", "batch", "pair", literal="batch", says="the sums inside Eq. 10 and 12 have no free index",
        help="sums in Eq. 10 and 12")
    literal_scale: bool = switch(
        "F1", False, True,
        says="the outer sums of Eq. 10 and 12, under which nothing depends on i, j; training at lr 0.1 then diverges",
        help="outer sums of Eq. 10 and 12, for batch alone")
    hinge: bool = switch(
        "F2", False, True, says="'inspired by the Lifted Structured Loss', which has one",
        help="hinge of the lifted structured loss")
    tau: float = setting(
        1.0, (1e-6, 1000), "temperature", register="F4", literal=1.0, says="e^d without a temperature")
    empty: str = switch(
        "F5", "skip", "keep", says="does not say what a row without positives adds",
        help="rows without positives or negatives")
    lambda1: float = setting(0.5, (-100, 100), "margin of Eq. 10; no gradient without hinge")
    lambda2: float = setting(0.5, (-100, 100), "margin of Eq. 12; no gradient without hinge")
    lambda3: float = setting(0.2, (0, 1000), "weight of the global loss in Eq. 13")
    same_keyword_positives: bool = switch(
        "F10", False, True, says="Eq. 3-6 literally; section 5 regrets it",
        help="the same keyword in other texts is a positive")
