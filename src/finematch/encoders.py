"""Image and text towers behind one interface; the only file whose timm and transformers models runs use.

Both take seconds to import, so that happens where a tower is built, and importing a method costs neither.

A tower maps keywords to `Tokens`. Pictures arrive as pixels (`Cells`, CLIP) or as precomputed vectors with
their boxes (`TokenTransformer`); texts as token ids (`BertTower`, `GRUTower`, CLIP) or as the cached states
of a frozen model (`TokenTransformer` again).

Axes: `b` items, `n` tokens, `d` width. Masks are True where there is something.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from finematch.config import located
from finematch.files import disguise


class Tokens(NamedTuple):
    """States of a tower: what they are, which are real, which are [IMG] / [CLS] / [SEP], and the pooled one."""

    states: Float[Tensor, "b n d"]
    mask: Bool[Tensor, "b n"]
    special: Bool[Tensor, "b n"]
    pooled: Float[Tensor, "b d"]


# ------------------------------------------------------------------------------- frozen picture backbones
class Cells(nn.Module):
    """A timm network as a grid of cells: pixels to a feature map "b d h w", or to tokens "b n d".

    Args:
        name: a timm name (`resnet50`, `vit_base_patch16_224`, `mobilenetv2_100`).
        weights: `""` for a random start, `"hub"` for timm's published weights, or a safetensors file.
            A file may lack the classifier; anything else missing or left over raises.
        mean, sd: normalisation, each one or three numbers on the [0, 1] scale; by default the model's own.
        stage: which of the network's stages (`-1` the last); networks without stages ignore it.
        options: passed to timm, e.g. `{"pad_type": "same"}` for weights that came from TensorFlow.
    """

    def __init__(
        self,
        name: str,
        *,
        weights: str | Path = "",
        mean: float | tuple[float, ...] | None = None,
        sd: float | tuple[float, ...] | None = None,
        stage: int = -1,
        options: dict | None = None,
    ):
        import timm

        super().__init__()
        self.name = name
        self.net = timm.create_model(name, pretrained=weights == "hub", **(options or {}))
        if weights not in ("", "hub"):
            load_backbone(self.net, weights)
        own = timm.data.resolve_model_data_config(self.net)
        self.size = own["input_size"][-1]
        for key, given, default in (("mean", mean, own["mean"]), ("sd", sd, own["std"])):
            value = torch.as_tensor(default if given is None else given, dtype=torch.float32)
            self.register_buffer(key, value.expand(3).reshape(3, 1, 1).clone(), persistent=False)
        self.prefix = getattr(self.net, "num_prefix_tokens", 0) if hasattr(self.net, "patch_embed") else 0
        self.stage = stage

    def forward(self, pixels: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b d h w"]:
        """Feature map of RGB pixels in [0, 1]; of a ViT, its patch tokens laid out as a map.

        The last stage is the network's own `forward_features` (after its final norm); earlier stages come
        from timm's `forward_intermediates`. Channels come first whatever the network's own layout is.
        """
        x = (pixels - self.mean) / self.sd
        if self.stage == -1 and not self.prefix:
            y = self.net.forward_features(x)
            channels_last = getattr(self.net, "output_fmt", "NCHW") == "NHWC"
            return y.permute(0, 3, 1, 2) if channels_last else y
        indices = [self.stage] if self.stage >= 0 else None
        return self.net.forward_intermediates(
            x, indices=indices, intermediates_only=True, norm=bool(self.prefix), stop_early=True
        )[-1 if indices else self.stage]


def load_backbone(net: nn.Module, path: str | Path) -> None:
    """Load a safetensors file into a timm network, as fp32; the classifier may be absent, nothing else.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not safetensors, or names or shapes do not fit; the message lists them.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file; give a .safetensors file, 'hub' or ''")
    try:
        state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
    except Exception as error:
        raise ValueError(
            f"{path} is not a safetensors file ({disguise(path) or error}); convert it first"
        ) from error
    head = tuple(f"{n}." for n in (net.default_cfg.get("classifier") or "classifier",) if isinstance(n, str))
    wanted = net.state_dict()
    wrong = [
        f"{k}: file {tuple(v.shape)}, network {tuple(wanted[k].shape)}"
        for k, v in state.items()
        if k in wanted and v.shape != wanted[k].shape and not k.startswith(head)
    ]
    missing = [k for k in wanted if k not in state and not k.startswith(head)
               and not k.endswith("num_batches_tracked")]  # fmt: skip
    extra = [k for k in state if k not in wanted and not k.startswith(head)]
    if wrong or missing or extra:
        raise ValueError(
            f"{path} does not fit {type(net).__name__}: missing {missing[:5]}, unknown {extra[:5]}, "
            f"of another shape {wrong[:5]} (first five each)"
        )
    net.load_state_dict(
        {k: v for k, v in state.items() if k in wanted and v.shape == wanted[k].shape}, strict=False
    )


# ------------------------------------------------------------------------------- towers over vectors
class TokenTransformer(nn.Module):
    """A randomly initialised Transformer over precomputed vectors: regions, grid cells, or cached text states.

    This is the image encoder of MVAM's FRCNN and ViT models (4.3). It prepends a learnt [IMG] token, whose
    state is the pooled one. Boxes, where known, enter as a linear map of (x1, y1, x2, y2, area) / picture.

    Args:
        input_dim: width of the incoming vectors.
        width, depth, heads, dropout: of the Transformer; `depth=0` leaves the layer norms around the projection.
        input_dropout: share of the incoming channels that an item loses, the same for all its vectors. A small
            set of frozen features is learnt by heart in an epoch or two without it.
        boxes: whether box positions are added.
        token: whether a token is prepended; without it the first incoming vector is the pooled one (the
            [CLS] of a cached text model).
    """

    def __init__(
        self,
        input_dim: int,
        *,
        width: int = 256,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
        input_dropout: float = 0.0,
        boxes: bool = False,
        token: bool = True,
    ):
        super().__init__()
        self.width = width
        # without an affine part: nothing before `project` learns, so no gradient of that width is computed
        self.norm_input = nn.LayerNorm(input_dim, elementwise_affine=False)
        self.drop_input = nn.Dropout(
            input_dropout
        )  # applied to a mask "b 1 e": a mask "b n e" costs n times more
        self.project = nn.Linear(input_dim, width)
        self.place = nn.Linear(5, width) if boxes else None
        self.token = nn.Parameter(torch.randn(width) * 0.02) if token else None
        self.layers = transformer(width, depth, heads, dropout)
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        features: Float[Tensor, "b n e"],
        mask: Bool[Tensor, "b n"],
        places: Float[Tensor, "b n 5"] | None = None,
        special: Bool[Tensor, "b n"] | None = None,
    ) -> Tokens:
        features = self.norm_input(features)
        if self.training and self.drop_input.p:
            features = features * self.drop_input(torch.ones_like(features[:, :1]))
        x = self.project(features)
        if self.place is not None:
            if places is None:
                raise ValueError("this tower was built with boxes=True, and the batch carries none")
            x = x + self.place(places)
        special = torch.zeros_like(mask) if special is None else special
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), 1, -1), x], dim=1)
            mask, special = F.pad(mask, (1, 0), value=True), F.pad(special, (1, 0), value=True)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask)
        states = self.norm(x)
        return Tokens(states, mask, special, states[:, 0])


def transformer(width: int, depth: int, heads: int, dropout: float) -> nn.ModuleList:
    """The layers of a pre-norm Transformer encoder, each "b n d" to "b n d"."""
    return nn.ModuleList(
        nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        for _ in range(depth)
    )


# ------------------------------------------------------------------------------- text towers
class BertTower(nn.Module):
    """BERT (Eq. 3): a hub name or a folder for `from_pretrained`, or a configuration for a random start.

    Any model that transformers' AutoModel opens and that returns `last_hidden_state` will do. Position 0 is
    [CLS], the pooled state.
    """

    def __init__(self, model: str | Path | Any):
        from transformers import AutoModel

        super().__init__()
        if isinstance(model, (str, Path)):
            self.net = AutoModel.from_pretrained(located(model), add_pooling_layer=False)
        else:
            self.net = AutoModel.from_config(model, add_pooling_layer=False)
        self.width = self.net.config.hidden_size

    def grow(self, vocabulary: int) -> None:
        """Random embeddings for new words, whose ids follow all others (questions have words that captions lack).

        Raises:
            ValueError: If the tower knows more words than `vocabulary` already.
        """
        known = self.net.config.vocab_size
        if vocabulary < known:
            raise ValueError(f"the text tower knows {known} words, more than the {vocabulary} asked for")
        self.net.resize_token_embeddings(vocabulary, mean_resizing=False)

    def forward(
        self, input_ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"], special: Bool[Tensor, "b n"]
    ) -> Tokens:
        states = self.net(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
        return Tokens(states, mask, special, states[:, 0])


def small_bert(vocabulary: int, *, width: int = 128, depth: int = 2, heads: int = 4, positions: int = 64):
    """A `BertConfig` small enough to learn from scratch on two cores."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=positions,
    )  # fmt: skip


def causal_decoder(text: nn.Module) -> nn.Module:
    """A BERT that reads states by cross attention and writes from left to right (`generate`), with the weights of the
    BERT `text` where it has them: all but the cross attention and the transform before the vocabulary."""
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(**{**text.config.to_dict(), "is_decoder": True, "add_cross_attention": True})
    config._attn_implementation = "eager"  # which gives its weights out
    decoder = BertLMHeadModel(config)
    decoder.bert.load_state_dict(text.state_dict(), strict=False)
    return decoder


class GRUTower(nn.Module):
    """Word embedding and one bidirectional GRU, the directions averaged (VSE++, SGRAF).

    The pooled state is the average of both directions' *last* states: forward at the last real word,
    backward at the first. Padding never enters (packed sequences).
    """

    def __init__(self, vocabulary: int, *, embed: int = 300, width: int = 256, dropout: float = 0.1):
        super().__init__()
        self.width = width
        self.embed = nn.Embedding(vocabulary, embed)
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(embed, width, batch_first=True, bidirectional=True)

    def forward(
        self, input_ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"], special: Bool[Tensor, "b n"]
    ) -> Tokens:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.dropout(self.embed(input_ids)), mask.sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        states, last = self.gru(packed)
        states, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=mask.shape[1])
        states = states.unflatten(-1, (2, self.width)).mean(2)
        return Tokens(states, mask, special, last.mean(0))


def text_tower(
    kind: str,
    size: int,
    *,
    width: int,
    depth: int,
    heads: int = 4,
    weights: Any = "",
    input_dropout: float = 0.0,
) -> nn.Module:
    """A text tower by name.

    Args:
        kind: `bert` (of `weights`, as `BertTower` takes them, else a small one with random weights), `gru` (random
            weights), or `minilm`: one Transformer layer over the cached states of a frozen model.
        size: of the vocabulary; for `minilm` the width of the states.
        depth: layers of the small BERT, at least one: a BERT without layers would be a bag of words.

    Raises:
        ValueError: For another `kind`.
    """
    if kind == "minilm":
        return TokenTransformer(size, width=width, depth=1, input_dropout=input_dropout, token=False)
    if kind == "gru":
        return GRUTower(size, width=width)
    if kind != "bert":
        raise ValueError(f"text is {kind!r}; use 'bert', 'gru' or 'minilm'")
    return BertTower(weights or small_bert(size, width=width, depth=max(1, depth), heads=heads))


# ------------------------------------------------------------------------------- CLIP
class CLIPVision(nn.Module):
    """CLIP's image tower with *all* its tokens usable.

    CLIP applies its last layer norm to the [CLS] token only, because only that one was trained against text.
    A method that attends to patches must apply it to every token, or they live on another scale.
    """

    def __init__(self, clip: nn.Module):
        super().__init__()
        self.net = clip.vision_model
        self.width = clip.config.vision_config.hidden_size

    def forward(self, pixels: Float[Tensor, "b 3 height width"]) -> Tokens:
        """Tokens of normalised pixels; position 0 is [IMG]."""
        states = self.net.post_layernorm(self.net(pixel_values=pixels).last_hidden_state)
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        special = torch.zeros_like(mask)
        special[:, 0] = True
        return Tokens(states, mask, special, states[:, 0])


class CLIPText(nn.Module):
    """CLIP's text tower. Causal, so its pooled state is the end-of-text token's, and everything after that
    token is padding even where the tokenizer pads with the same id: the mask is cut there."""

    def __init__(self, clip: nn.Module):
        super().__init__()
        self.net = clip.text_model
        self.width = clip.config.text_config.hidden_size
        self.eos = clip.config.text_config.eos_token_id

    def forward(
        self, input_ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"], special: Bool[Tensor, "b n"]
    ) -> Tokens:
        states = self.net(input_ids=input_ids).last_hidden_state
        # OpenAI's published configurations name id 2 where the real end-of-text is the highest id
        eos = (
            self.net.config.vocab_size - 1
            if self.eos == 2 and self.net.config.vocab_size > 40_000
            else self.eos
        )
        is_end = input_ids == eos
        if not is_end.any(1).all():
            raise ValueError(
                f"row {int((~is_end.any(1)).nonzero()[0])} has no end-of-text token (id {eos}): "
                "use the tokenizer of this CLIP, and let it truncate"
            )
        end = is_end.int().argmax(1)
        real = torch.arange(input_ids.shape[1], device=end.device)[None] <= end[:, None]
        return Tokens(states, mask & real, special, states[torch.arange(len(end), device=end.device), end])


def open_clip_model(model: str | Path | Any) -> nn.Module:
    """A `CLIPModel` from a hub name, a folder, or a `CLIPConfig` (random start)."""
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(str(model)) if isinstance(model, (str, Path)) else CLIPModel(model)


def small_clip(vocabulary: int, *, eos: int, bos: int, size: int = 64, patch: int = 8, width: int = 128,
               depth: int = 3, positions: int = 64):  # fmt: skip
    """A `CLIPConfig` for the embedded set: the same classes as the published one, 64 px, minutes."""
    from transformers import CLIPConfig

    common = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth,
              "num_attention_heads": 4, "projection_dim": width}  # fmt: skip
    return CLIPConfig(
        text_config={**common, "vocab_size": vocabulary, "max_position_embeddings": positions,
                     "eos_token_id": eos, "bos_token_id": bos, "pad_token_id": 0},
        vision_config={**common, "image_size": size, "patch_size": patch},
        projection_dim=width,
    )  # fmt: skip


def config_of(model: str | Path):
    """The transformers configuration of a hub name or folder (no weights are read)."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(model))


def open_config(content: dict):
    """The transformers configuration that `tower_configs` wrote."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**content)


def tower_configs(model: nn.Module) -> dict[str, dict]:
    """Configurations of a model's transformers towers, as JSON has them: `bert`, or `clip` of both towers of a CLIP."""
    found: dict[str, dict] = {}
    for part in model.modules():
        if isinstance(part, BertTower):
            found.setdefault("bert", part.net.config)
        elif isinstance(part, (CLIPVision, CLIPText)):
            name = "vision_config" if isinstance(part, CLIPVision) else "text_config"
            found.setdefault("clip", {"model_type": "clip"})[name] = part.net.config
    return json.loads(json.dumps(found, default=lambda config: config.to_dict()))


# ------------------------------------------------------------------------------- vision-language models, whole
class VisionLanguage(nn.Module):
    """A dual encoder as it was published: pictures "b q d" and texts "b d" as unit vectors of one space.

    A picture has `q` vectors: one, or as many as BLIP-2 has queries. Subclasses say which transformers class it
    is, which of its parts to run, and how many tokens of a text it can place.

    Args:
        model: hub name or folder. Weights that the class needs and the model lacks raise ValueError: a captioning
            BLIP opens as a retrieval one otherwise, with random projections.
    """

    opens: str

    def __init__(self, model: str | Path):
        import transformers

        super().__init__()
        self.net, report = getattr(transformers, self.opens).from_pretrained(
            str(model), dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(
                f"{model} is no {self.opens}: it lacks {sorted(report['missing_keys'])[:5]} (first five); "
                "take a model that was trained for image-text retrieval"
            )

    def image(self, pixels: Float[Tensor, "b c height width"]) -> Float[Tensor, "b q d"]:
        """Vectors of pictures that the model's own image processor made."""
        return F.normalize(self._image(pixels).float(), dim=-1)

    def text(self, input_ids: Int[Tensor, "b n"], mask: Int[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        """Vectors of texts that the model's own tokenizer made."""
        return F.normalize(self._text(input_ids, mask).float(), dim=-1)


class CLIPFeatures(VisionLanguage):
    """CLIP: the projected [CLS] state, and the projected end-of-text state."""

    opens = "CLIPModel"

    @property
    def positions(self) -> int:
        return self.net.config.text_config.max_position_embeddings

    def _image(self, pixels: Tensor) -> Tensor:
        return self.net.get_image_features(pixel_values=pixels).pooler_output[:, None]

    def _text(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        return self.net.get_text_features(input_ids=input_ids, attention_mask=mask).pooler_output


class BLIPFeatures(VisionLanguage):
    """BLIP: the projected states at position 0, 256-d. The raw ones (768-d) are in no common space (F15)."""

    opens = "BlipForImageTextRetrieval"

    @property
    def positions(self) -> int:
        return self.net.config.text_config.max_position_embeddings

    def _image(self, pixels: Tensor) -> Tensor:
        return self.net.vision_proj(self.net.vision_model(pixel_values=pixels).last_hidden_state[:, :1])

    def _text(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        states = self.net.text_encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return self.net.text_proj(states[:, 0])


class BLIP2Features(VisionLanguage):
    """BLIP-2: its projected queries (32), and the projected state at position 0 of the text, 256-d (F16)."""

    opens = "Blip2ForImageTextRetrieval"

    @property
    def positions(self) -> int:
        return self.net.config.qformer_config.max_position_embeddings

    def _image(self, pixels: Tensor) -> Tensor:
        patches = self.net.vision_model(pixel_values=pixels).last_hidden_state
        queries = self.net.query_tokens.expand(len(pixels), -1, -1)
        seen = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
        states = self.net.qformer(
            query_embeds=queries, encoder_hidden_states=patches, encoder_attention_mask=seen
        ).last_hidden_state
        return self.net.vision_projection(states)

    def _text(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        words = self.net.embeddings(input_ids=input_ids)
        states = self.net.qformer(query_embeds=words, query_length=0, attention_mask=mask).last_hidden_state
        return self.net.text_projection(states[:, 0])


def open_vision_language(model: str | Path) -> VisionLanguage:
    """CLIP, BLIP or BLIP-2 from a hub name or a folder, frozen; which one its configuration says.

    Raises:
        ValueError: For another kind of model, or one without the weights of a retrieval model.
    """
    known = {"clip": CLIPFeatures, "blip": BLIPFeatures, "blip-2": BLIP2Features}
    kind = config_of(model).model_type
    if kind not in known:
        raise ValueError(f"{model} is a {kind!r} model; use one of {tuple(known)}")
    return known[kind](model).eval().requires_grad_(False)


# ------------------------------------------------------------------------------- detectors
def deformable_detr(state: dict[str, Tensor], *, backbone: str, source: str | Path, **shape) -> nn.Module:
    """A frozen Deformable DETR with the weights of `state`, in the names of transformers' published checkpoints.

    Those names outlive the releases of transformers, which renames on loading; its parameters' own do not.

    Args:
        backbone: a timm network with three levels of features (`resnet50`).
        source: what an error names.
        shape: of DeformableDetrConfig.

    Raises:
        ValueError: If a weight is missing, left over, or of another shape; the message lists them.
    """
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, TimmBackboneConfig

    config = DeformableDetrConfig(
        backbone_config=TimmBackboneConfig(
            backbone=backbone, out_indices=[2, 3, 4], features_only=True, use_pretrained_backbone=False
        ),
        **shape,
    )
    net, report = DeformableDetrForObjectDetection.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, ignore_mismatched_sizes=True,
        output_loading_info=True,
    )  # fmt: skip
    missing, extra, wrong = (
        sorted(map(str, report[k])) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    if missing or extra or wrong:
        raise ValueError(
            f"{source} does not fit a Deformable DETR on {backbone}: missing {missing[:5]}, unknown {extra[:5]}, "
            f"of another shape {wrong[:5]} (first five each)"
        )
    return net.eval().requires_grad_(False)
