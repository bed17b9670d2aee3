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
