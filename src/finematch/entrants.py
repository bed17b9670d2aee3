"""Who competes in the arena, and which method's presets each has (`arena` trains and measures them)."""

from __future__ import annotations

from finematch.config import Settings

# the method whose recipe an entrant has
BESIDE = {"two-stream": "mvam", "pvse": "mvam", "mvam-1": "mvam", "mvam": "mvam", "scan": "hslm",
          "saf": "hslm", "hslm-global": "hslm", "hslm": "hslm", "slan": "slan"}  # fmt: skip
NO_VIEWS = {
    "diversity_weight": 0.01
}  # of a loss that is not computed: one value, one run under both readings
# an entrant's own settings of that method, beside those that all share
OWN = {
    "two-stream": {"pooling": "mean"} | NO_VIEWS,
    "pvse": NO_VIEWS,  # its own weights are those of `rivals.PVSE`
    "mvam-1": {"pooling": "attention", "views": 1, "diversity": "none"},
    # row 1 of HSLM's Table 4
    "hslm-global": {"mgcn": False, "self_attn": False, "cross_attn": False, "glob": True, "loc": False},
}


def own_settings(s: Settings) -> Settings:
    """The presets of the method that an entrant has its recipe of, with what the arena sets."""
    shared = ("dataset", "data_root", "scale", "seed", "smoke", "report", "cache", "batch_size",
              "precision")  # fmt: skip
    given = {name: getattr(s, name) for name in shared} | {"reading": s.recipe}
    regions = {"regions": s.regions, "proposals": s.proposals}
    of_method = {
        "mvam": regions | {"backbone": s.backbone, "text": "gru", "places": False},  # nobody else has places
        "hslm": regions,
        "slan": detected(s.detector),
    }
    method = BESIDE[s.entrant]
    made = Settings(method, given | of_method[method] | OWN.get(s.entrant, {}))
    return made if s.lr_times == 1 else made.replace(lr=made.lr * s.lr_times)


def detected(detector: str) -> dict:
    """SLAN's settings over a detector: it stays as it is, and its proposals pass non-maximum suppression, as in the row
    `detector-frozen` of the grid `slan_boxes`. A file of boxes (.json) holds what has passed it already."""
    if not detector:
        return {}
    return {"detector": detector} | ({} if detector.endswith(".json") else {"frozen": True, "nms": 0.7})
