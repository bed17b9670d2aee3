"""The data and the model of a finished run again, from its resolved settings: the lines that its `2_train` page shows.

`runs.open_run` comes here. A page shows the same steps in sight; a test holds the two together, by the weights and the
metrics that a run left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from finematch.checkpoints import load_best
from finematch.config import Settings, located, root
from finematch.data import digests
from finematch.data.fragment_sets import FragmentSets, open_fragment_sets
from finematch.data.pairs import BoxedSource, RegionSource
from finematch.data.record import DataError
from finematch.data.splits import Split, data_folder, open_records, open_splits, reported_split, selection
from finematch.encoders import (
    BertTower,
    CLIPText,
    CLIPVision,
    TokenTransformer,
    open_clip_model,
    small_bert,
    text_tower,
)
from finematch.evaluation.embedding import validation
from finematch.evaluation.fragments import AnnotatedPhrases, Gallery
from finematch.features.backbones import Backbone
from finematch.features.detreg import open_proposals
from finematch.features.fragments import (
    PROMPTS,
    VLP,
    document,
    extract_keywords,
    open_vlp,
    picture_fragments,
    provenance,
    text_fragments,
    text_records,
    whole_pictures,
    whole_texts,
)
from finematch.features.inputs import (
    boxed_images,
    caption_states,
    caption_tokens,
    check_together,
    clip_images,
    frozen_network,
    given_images,
    map_images,
    minilm_folder,
    open_clip,
    open_tokenizer,
    origin,
    pixel_images,
    published_regions,
    reads,
    region_images,
)
from finematch.features.proposals import Proposals, extract_proposals, given
from finematch.features.small_clip import open_small_clip
from finematch.features.tasks import task_tokenizer
from finematch.files import digest
from finematch.models.configs import (
    AnsweringConfig,
    CaptioningConfig,
    FELGAConfig,
    HSLMConfig,
    LocalizationConfig,
    MVAMConfig,
    SLANConfig,
)
from finematch.models.felga import FELGA
from finematch.models.hslm import HSLM
from finematch.models.mvam import MVAM
from finematch.models.slan.matching import Words
from finematch.models.slan.objective import SLAN
from finematch.models.slan.start import train_encoders
from finematch.text import KeywordMethod, keyword_method
from finematch.training import Plan, accelerator, precision_on, seed_everything


def rebuild(run) -> tuple[Any, nn.Module]:
    """Data and model of a finished `runs.Run`; the model has the weights of its best epoch and is in eval mode.

    Raises:
        ValueError: For an ensemble, which is several models, or a baseline without a model.
    """
    s, weights = run.settings, run.folder / "best.safetensors"
    if run.method == "mvam" and s.ensemble > 1:
        raise ValueError(
            f"{run.folder} holds an ensemble of {s.ensemble} models: open its members' runs one by one"
        )
    if run.method == "felga" and s.features != "fenet":
        raise ValueError(f"{run.folder} is a baseline without FENet (features={s.features}): it has no model")
    if run.method == "arena":
        from finematch.arena import open_entrant  # which knows all methods

        entrant = open_entrant(s, root())
        data, model = entrant.inputs, entrant.model
    elif run.method in TASKS:
        pretrained = pretrained_run(s)
        data, model = pretrained.data, TASKS[run.method](s, pretrained)
    else:
        data = open_gallery(s, root(), run.parameters) if run.method == "felga" else open_inputs(s, root())
        model = build(s, data)
    two = run.folder / "stage2" / "best.safetensors"  # MVAM of a given CLIP, trained in two stages
    weights = two if two.is_file() else weights
    load_best(model, weights)
    return data, model.to(accelerator()).eval()


def build(s, shape: Shape | Inputs | RunData) -> nn.Module:
    """The model of a run with the settings `s`, with random weights; `shape` is its data's, or the data themselves."""
    if s.method == "mvam":
        return MVAM(*towers(s, shape), MVAMConfig.of(s))
    if s.method == "hslm":
        return HSLM(shape.features, shape.words, HSLMConfig.of(s))
    if s.method == "felga":
        return FELGA(shape.features, FELGAConfig.of(s))
    return slan_model(s, shape)


def untrained(run, seed: int) -> nn.Module:
    """The model of a finished run of SLAN with the random weights of `seed`, in eval mode. The proposals of a detector,
    which the run was given and did not learn, are the detector's."""
    s = run.settings.replace(seed=seed, pretrained="", encoder_epochs=0)
    return slan_begun(s, run.data, root()).to(accelerator()).eval()


def pretrained_run(s):
    """The finished run of `slan/2_train` that a task begins with: `s.pretrained`, or the newest one.

    Its data are read from the task's `data_root` and `cache`.

    Raises:
        DataError: As `runs.open_run`, or for a run of another dataset or scale.
    """
    from finematch.runs import open_run

    if s.pretrained in ("", "latest"):
        try:
            run = open_run("latest", method="slan", dataset=s.dataset, scale=s.scale)
        except DataError:
            if not s.smoke:
                raise
            run = open_run("latest", method="slan", dataset=s.dataset, scale=s.scale, smoke=True)
    else:
        run = open_run(s.pretrained)
    if run.method != "slan" or (run.parameters["dataset"], run.parameters["scale"]) != (s.dataset, s.scale):
        found = f"{run.method} on {run.parameters['dataset']}, scale {run.parameters['scale']}"
        raise DataError(run.folder, "pretrained", f"is a run of {found}, not of slan on {s.dataset}, scale {s.scale}",
                        "Give dataset and scale of the run, or another run")  # fmt: skip
    run.parameters |= {"data_root": s.data_root, "cache": s.cache}
    return run


def with_run(s, pretrained):
    """The settings of a task, with the run that was the latest by its place in the workbook."""
    if s.pretrained not in ("", "latest"):
        return s
    folder, base = pretrained.folder.resolve(), root().resolve()
    return s.replace(pretrained=str(folder.relative_to(base) if folder.is_relative_to(base) else folder))


def seen_as(s, pretrained) -> Callable[[Any], dict[str, Any]]:
    """What makes images of other records as the pretrained run sees its own, with the boxes that it was given."""
    of_run, network = pretrained.settings, pretrained.data.network
    if s.scale == "paper":
        see = partial(pixel_images, size=of_run.size)
    else:
        see = partial(map_images, network=network, cache=root() / s.cache, stages=of_run.maps)
    return lambda records: given_images(records, see(records), of_run.detector, count=of_run.count)


def _start(s, pretrained, words: int = 0) -> nn.Module:
    """The pretrained run's model, or one of its shape with random weights; it knows at least so many `words`."""
    model = pretrained.model if s.start == "pretrained" else pretrained.untrained(s.seed)
    if words:
        model.encoders.towers.text_encoder.grow(words)
    return model


def slan_localizer(s, pretrained) -> nn.Module:
    """SLAN's detection and grounding head on the pretrained run's model, or on one of its shape with random weights."""
    from finematch.models.slan.detection import Localizer, open_filter

    model = _start(s, pretrained)
    if s.task == "grounding" and s.grounding_top:
        open_filter(model.locator, s.grounding_top, model.locator.filter.threshold)
    return Localizer(model, LocalizationConfig.of(s), task=s.task).to(accelerator())


def slan_captioner(s, pretrained) -> nn.Module:
    """SLAN's captioner, likewise."""
    from finematch.models.slan.captioning import Captioner

    return Captioner(_start(s, pretrained), pretrained.data.tokenizer, CaptioningConfig.of(s)).to(
        accelerator()
    )


def slan_answerer(s, pretrained) -> nn.Module:
    """SLAN's decoder of answers, likewise."""
    from finematch.models.slan.vqa import Answerer

    words = len(task_tokenizer(s.dataset, pretrained.data.tokenizer))
    return Answerer(_start(s, pretrained, words), AnsweringConfig.of(s)).to(accelerator())


def slan_pair_classifier(s, pretrained) -> nn.Module:
    """SLAN's head for two images, likewise."""
    from finematch.models.slan.nlvr2 import PairClassifier

    words, of_run = len(task_tokenizer(s.dataset, pretrained.data.tokenizer)), pretrained.settings
    return PairClassifier(_start(s, pretrained, words), of_run.width, heads=of_run.heads).to(accelerator())


def slan_video(s, pretrained) -> nn.Module:
    """SLAN on frames of videos, likewise."""
    from finematch.models.slan.video import VideoSLAN

    words = len(task_tokenizer(s.dataset, pretrained.data.tokenizer))
    return VideoSLAN(_start(s, pretrained, words), s.frames).to(accelerator())


TASKS = {  # what a run of `slan/2_train` is fine-tuned for, by the presets of its page
    "slan_localization": slan_localizer,
    "slan_captioning": slan_captioner,
    "slan_vqa": slan_answerer,
    "slan_nlvr2": slan_pair_classifier,
    "slan_video": slan_video,
}


@dataclass
class Shape:
    """What data give a model's architecture: sizes that JSON can say, and the configurations of towers. A model is
    built of it where the data are not; `Inputs` and `RunData` have the same attributes.

    Attributes:
        features: width of a region's, a cell's or a fragment's frozen features. boxes: whether regions have places.
        channels: of the maps of a frozen network. given: whether images bring boxes of a detector.
        states: width of the cached states of a text. words: of the tokenizer. captions: of the train split.
        clip, bert: the configuration of the CLIP, or of the text tower; None where the settings say it.
        tokenizer, processor, network: as of `Inputs`.
    """

    features: int = 0
    boxes: bool = False
    channels: tuple[int, ...] = ()
    given: bool = False
    states: int = 0
    words: int = 0
    captions: int = 0
    clip: Any = None
    bert: Any = None
    tokenizer: Any = None
    processor: Any = None
    network: Any = None


@dataclass
class Inputs:
    """What a run reads. `network` looked at the images (None: published arrays, or pixels go into the model);
    `clip` is the source of `encoders.open_clip_model` and `processor` its image processor, for a run of a CLIP."""

    splits: dict[str, Split]
    reported: str
    data_root: Path
    tokenizer: Any
    network: Backbone | None = None
    clip: Any = None
    processor: Any = None
    bert: None = None  # settings name the text tower

    @property
    def features(self) -> int:
        return getattr(self.splits["train"].images, "width", 0)

    @property
    def boxes(self) -> bool:
        return getattr(self.splits["train"].images, "places", None) is not None

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(getattr(self.splits["train"].images, "channels", ()))

    @property
    def given(self) -> bool:
        return isinstance(self.splits["train"].images, BoxedSource)

    @property
    def states(self) -> int:
        return getattr(self.splits["train"].texts, "width", 0)

    @property
    def words(self) -> int:
        return len(self.tokenizer)

    @property
    def captions(self) -> int:
        return len(self.splits["train"].captions)

    @property
    def select(self) -> str:
        """The validation metric that chooses the epoch, see `data.splits.selection`."""
        return selection(self.splits)


def open_inputs(s, root: Path) -> Inputs:
    """Records, image features (or pixels) and texts of a run of MVAM, HSLM or SLAN with the settings `s`."""
    backbone, kind = {"hslm": ("regions", "gru"), "slan": ("maps", "bert")}.get(s.method) or (
        s.backbone,
        s.text,
    )
    check_together(backbone, kind)
    cache = root / s.cache
    data_root = data_folder(s.dataset, root / s.data_root, cache, smoke=s.smoke)
    network = clip = processor = tokenizer = None
    if published := reads(s) == "arrays":
        arrays = published_regions(s.dataset, data_root, report=s.report, smoke=s.smoke)
        records = {split: a.records() for split, a in arrays.items()}
        images = {split: RegionSource(a) for split, a in arrays.items()}
    else:
        unseen = s.unseen if s.method == "slan" else ""
        records = open_records(s.dataset, data_root, report=s.report, smoke=s.smoke, unseen=unseen)
    if backbone == "clip":
        clip, tokenizer, processor = open_clip(s.dataset, data_root, weights=s.clip_weights, scale=s.scale)
        images = clip_images(records, clip, processor)
    elif backbone == "maps" and s.scale == "paper":
        images = pixel_images(records, s.size)
    elif backbone == "maps":
        network = frozen_network(s.dataset, data_root, cache, told="captions", vision=s.vision,
                                 weights=s.vision_weights, smoke=s.smoke, unseen=s.unseen)  # fmt: skip
        images = map_images(records, network, cache, stages=s.maps)
    elif not published:
        network = frozen_network(s.dataset, data_root, cache, scale=s.scale, vision=s.vision, weights=s.vision_weights,
                                 smoke=s.smoke)  # fmt: skip
        of = "cells" if backbone == "grid" else "regions"
        images = region_images(records, network, cache, kind=of, regions=s.regions, proposals=s.proposals)
    if kind == "minilm":
        texts, tokenizer = caption_states(records, s.text_weights or minilm_folder(), cache)
    else:
        tokenizer = tokenizer or open_tokenizer(s.dataset, data_root, scale=s.scale, weights=s.text_weights)
        texts = caption_tokens(records, tokenizer)
    if s.method == "slan":
        images = given_images(records, images, s.detector, count=s.count, echo=None)
    splits = open_splits(records, images, texts)
    return Inputs(splits, reported_split(records), data_root, tokenizer, network, clip, processor)


def towers(s, shape: Shape | Inputs) -> tuple[nn.Module, nn.Module]:
    """MVAM's two towers with new weights, random ones unless `s` names some."""
    if shape.clip is not None:
        clip = open_clip_model(shape.clip)
        return CLIPVision(clip), CLIPText(clip)
    vision = TokenTransformer(shape.features, width=s.width, depth=s.depth, input_dropout=s.input_dropout,
                              boxes=s.places and shape.boxes)  # fmt: skip
    size = shape.states if s.text == "minilm" else shape.words
    weights = (s.text_weights or "bert-base-uncased") if s.scale == "paper" else ""
    return vision, text_tower(s.text, size, width=s.width, depth=s.depth, weights=shape.bert or weights,
                              input_dropout=s.input_dropout)  # fmt: skip


def map_towers(s, shape: Shape | Inputs) -> tuple[nn.Module, nn.Module]:
    """SLAN's two encoders with new weights: of the images' maps, and of the text.

    At scale `paper` an image network is trained, a ResNet-50 unless named, with random weights ("all random
    initialized") unless `s` names some.
    """
    # not at the top: torchvision takes as long to import as torch
    from finematch.models.slan.towers import CachedStages, pixel_stages

    if s.scale == "paper":
        image = pixel_stages(s.vision, weights=s.vision_weights, stages=s.stages)
        return image, BertTower(shape.bert or s.text_weights or "bert-base-uncased")
    text = small_bert(shape.words, width=s.width, depth=s.text_depth, heads=s.text_heads)
    return CachedStages(shape.channels), BertTower(text)


def slan_model(s, shape: Shape | Inputs, *, steps_per_epoch: int | None = None) -> SLAN:
    """SLAN with the random weights of its seed: towers (3.1), self-locator (3.2) and objective (3.3).

    Args:
        steps_per_epoch: by which `random_negatives`, a share of the run, becomes a number of steps; without it that of
            the dataset's own pairs.
    """
    from finematch.models.slan.locator import SelfLocator, locator_config
    from finematch.models.slan.towers import Towers

    seed_everything(s.seed)
    image, text = map_towers(s, shape)
    encoders = Towers(image, text, s.width)
    locator = SelfLocator(encoders.channels, locator_config(s, encoders.channels), encoder=image)
    if shape.given:
        locator.take_given()
    steps = shape.captions // s.batch_size if steps_per_epoch is None else steps_per_epoch
    return SLAN(
        encoders, locator, SLANConfig.of(s, reg_weight=s.reg_weight if s.levels else 0.0),
        words=Words.of(shape.tokenizer), random_steps=round(s.random_negatives * s.epochs * steps),
    )  # fmt: skip


def slan_detector(s, inputs: Inputs, cache: Path) -> Path:
    """The weights of the detector of a run with `detector=boxes`."""
    from finematch.models.slan.detector import train_detector
    from finematch.models.slan.locator import locator_config
    from finematch.models.slan.towers import pixel_stages

    images = {name: part.images for name, part in inputs.splits.items()}

    def see(records):
        if s.scale == "paper":
            return pixel_images(records, s.size)
        return map_images(records, inputs.network, cache, stages=s.maps)

    boxed, boxes = boxed_images(s.dataset, inputs.data_root, images, see)
    if s.scale != "paper":
        channels = inputs.splits["train"].images.channels
        return train_detector(cache, boxed, boxes, locator_config(s, channels))
    seed_everything(s.seed)
    encoder = pixel_stages(s.vision, weights=s.vision_weights, stages=s.stages)
    return train_detector(
        cache, boxed, boxes, locator_config(s, encoder.channels), encoder=encoder, plan=slan_plan(s)
    )


def slan_plan(s, *, epochs: int | None = None) -> Plan:
    """How a run of SLAN trains, or, with other `epochs`, its encoders before."""
    shared = ("batch_size", "lr", "weight_decay", "schedule", "warmup", "clip_norm", "precision", "workers",
              "checkpoint_steps", "seed")  # fmt: skip
    return Plan(epochs=s.epochs if epochs is None else epochs, **{name: getattr(s, name) for name in shared})


def slan_begun(s, inputs: Inputs, base: Path, *, echo=None) -> SLAN:
    """The model of a run before its first step with the locator: a detector's proposals, a pretrained run's weights, or
    encoders that the contrast has trained."""
    from finematch.models.slan.proposals import load_proposals

    cache, weights = base / s.cache, base / s.detector
    if s.detector == "boxes":
        weights = slan_detector(s, inputs, cache)
    model = slan_model(s, inputs)
    if s.detector and not isinstance(inputs.splits["train"].images, BoxedSource):
        image, locator = model.encoders.towers.image_encoder, model.locator
        load_proposals(locator.proposals, weights, decoder=locator.decoder, encoder=image)
        locator.keep(image)
    if s.pretrained:
        model.load_pretrained(base / s.pretrained)
    elif s.encoder_epochs:
        train_encoders(
            model, inputs.splits["train"].pairs(), slan_plan(s, epochs=s.encoder_epochs), cache, slan_key(inputs),
            evaluate=lambda m: validation(m, inputs.splits["val"]), select=inputs.select, echo=echo,
        )  # fmt: skip
    return model


def slan_key(inputs: Inputs) -> dict:
    """What trained encoders depend on beside their plan and the weights at the start: words, captions, maps."""
    return {
        "words": digest(inputs.tokenizer.get_vocab()),
        "data": {name: digests(split.records) for name, split in inputs.splits.items()},
        "maps": origin({name: split.images for name, split in inputs.splits.items()}),
    }


# ------------------------------------------------------------------------------------------- FELGA
@dataclass
class Networks:
    """The frozen networks of a run of FELGA, and its cache; `propose` calls `extract_proposals` with its detector."""

    vlp: VLP
    propose: Callable[..., Proposals]
    keywords_of: KeywordMethod
    cache: Path


@dataclass
class RunData:
    """What a run of FELGA was measured on; `proposals` are those of the gallery's images."""

    sets: FragmentSets
    networks: Networks
    proposals: Proposals
    gallery: Gallery
    annotated: AnnotatedPhrases | None

    @property
    def features(self) -> int:
        """Width of the frozen features."""
        return self.gallery.classes.features.shape[-1]


def felga_networks(s: Settings, root: Path, sets: FragmentSets, *, arithmetic: str = "") -> Networks:
    """The frozen networks of a run of FELGA with the settings `s`; the small CLIP is trained where it is not cached.

    `arithmetic` is that of the run's features where it is known; the device's otherwise (`vlp_precision`).
    """
    # a name of a file or folder is a path below the workbook's folder; any other name stays as it is
    files = {name: located(getattr(s, name)) for name in ("vlp", "proposals", "keyword_model")}
    cache = root / s.cache / (s.dataset + ("-smoke" if s.smoke else ""))
    name = files["vlp"] or "clip"
    if not files["vlp"] and s.scale == "tiny":
        name = open_small_clip(sets, s.dataset, cache, networks=root / s.cache, smoke=s.smoke, echo=None)
    detector = open_proposals(
        files["proposals"],
        scale=s.scale,
        weights=root / s.data_root / "weights",
        device=accelerator(),
        echo=None,
    )
    minilm = (files["keyword_model"] or minilm_folder()) if s.keywords == "keybert" else ""
    texts = [document(record) for record in text_records(sets.train, s.text)[0]]
    keywords_of = keyword_method(s.keywords, model=minilm, train=texts, top=s.words)
    propose = partial(extract_proposals, method=detector, cache=cache / "proposals", top=s.regions,
                      min_side=5 if s.dataset == "scenes" else 8)  # fmt: skip
    precision = arithmetic or precision_on(accelerator(), s.vlp_precision)
    return Networks(open_vlp(name, precision=precision).to(accelerator()), propose, keywords_of, cache)


def open_gallery(s: Settings, root: Path, was: dict) -> RunData:
    """The gallery that a run of FELGA was measured on; what its cache lacks is made again.

    Args:
        was: parameters of the run's metrics.json, among them what made its features (`provenance`).

    Raises:
        DataError: If networks or methods are not those that the run used: its weights do not fit their features.
    """
    sets = open_fragment_sets(s.dataset, root / s.data_root, root / s.cache, report=s.report, smoke=s.smoke)
    networks, split = felga_networks(s, root, sets, arithmetic=was.get("vlp_arithmetic", "")), s.report
    vlp, rows = networks.vlp, networks.cache / "fragments"
    text_of, several_texts = text_records(sets.gallery, s.text)
    texts = [document(record) for record in text_of]
    several = s.features != "fenet" and s.crop_score == "max" and vlp.queries > 1
    crops = partial(picture_fragments, model=vlp, cache=rows, queries=several)
    words = partial(text_fragments, model=vlp, cache=rows)

    proposals = boxes = networks.propose(sets.gallery, split=split)
    now = provenance(vlp, proposals, networks.keywords_of)
    if changed := {name: (was[name], value) for name, value in now.items() if was.get(name, value) != value}:
        raise DataError(networks.cache, "the fragments", f"are not those of the run (was, is): {changed}",
                        "Run 2_train again, or give the cache that it was trained with")  # fmt: skip
    if s.features == "whole":
        regions = whole_pictures(sets.gallery, vlp, rows, f"{split}_whole", queries=several)
        keywords = whole_texts(texts, vlp, rows, f"{split}_whole")
    else:
        regions = crops(sets.gallery, boxes, split=split)
        keywords = words(
            extract_keywords(texts, networks.keywords_of, networks.cache / "keywords", split),
            split=f"{split}_keywords",
        )
    gallery = Gallery(
        sets.gallery, sets.categories, regions=regions, keywords=keywords,
        boxes=crops(sets.gallery, given(sets.gallery), split=f"{split}_objects"),
        classes=words([[PROMPTS[s.prompt].format(name)] for name in sets.categories], split="classes"),
        synonyms=sets.synonyms, name=sets.name, texts=text_of if several_texts else None,
    )  # fmt: skip
    if not sets.annotated or s.features == "whole":
        return RunData(sets, networks, proposals, gallery, None)
    if [r.image for r in sets.annotated] != [r.image for r in sets.gallery]:
        boxes = networks.propose(sets.annotated, split="annotated")
        regions = crops(sets.annotated, boxes, split="annotated")
    phrases = [[r.captions[a.caption][a.start : a.end] for a in r.phrases] for r in sets.annotated]
    annotated = AnnotatedPhrases(
        sets.annotated, boxes, regions, words(phrases, split="phrases"), sets.annotated_name
    )
    return RunData(sets, networks, proposals, gallery, annotated)
