"""HSLM: Learning Hierarchical Semantic Correspondences for Cross-Modal Image-Text Retrieval (ICMR 2022).

In the paper's order: 3.1 regions, 3.2 words and their self-attention, 3.3 multi-layer graph convolution and the
bidirectional GRU, 3.4 cross attention, 3.5 similarity, 3.6 objective. Every reading of the paper that could go
either way is a setting, declared in `HSLMConfig`.

Every picture is scored against every caption, so the model is two things: what is computed once per picture and
once per caption (`encode_image`, `encode_text`), and what is computed for each pair (`PairScorer`). The pairs cost
a thousand times more, and three exact identities keep them at the speed of a matrix product:

* a context is a weighted sum of regions, so its norm needs the regions' Gram matrix alone (`p^T R R^T p`);
* a linear layer of a context is the same sum of that layer of the regions, done once per picture;
* captions of one length share a product, so that neither padding nor a loop over captions is computed.

Ranking a split needs no gradient: `PairScorer.rank` gives the same scores there, to rounding, 1.3 times as fast.

Axes: `b` pictures, `c` captions, `p` pairs, `n` regions, `l` words of a caption, `d` joint width (d_1 in the paper),
`e` word width (d_2), `s` width of a similarity vector (m in the paper).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from finematch.hub import Pretrained
from finematch.losses import gather, longest, wide
from finematch.models.configs import HSLMConfig
from finematch.training import to_device

MODULES = ("mgcn", "self_attn", "cross_attn", "glob", "loc")  # of Table 4


class Picture(NamedTuple):
    """Pictures, ready for any caption: regions R*, and what their pairs need of them."""

    regions: Float[Tensor, "b n d"]
    mask: Bool[Tensor, "b n"]

    def __getitem__(self, index) -> Picture:
        return Picture(*(part[index] for part in self))


class Caption(NamedTuple):
    """Captions, ready for any picture: words E* (real words first, then padding) and the global vector."""

    words: Float[Tensor, "c l d"]
    mask: Bool[Tensor, "c l"]
    vector: Float[Tensor, "c d"] | None

    def __getitem__(self, index) -> Caption:
        return Caption(*(None if part is None else part[index] for part in self))


# ------------------------------------------------------------------------------ 3.2 self-attention of the words
class WordSelfAttention(nn.Module):
    """Eq. 3-6: words that other words relate to are strengthened, the others weakened.

        E_f = (E_K E_Q^T / M) E_V        rows are words; M is the number of real words of the caption

    The paper writes E as columns and multiplies three matrices that do not conform. `word` (default) reads the
    product as relations between words, M x M, for the text says that words are filtered, and 1/M is what the cited
    VSRN divides relations by. `channel` is the order as written, (E_K E_Q^T / M) E_V with E as columns, so that the
    bracket relates channels, e x e. `softmax` is the usual softmax(E_K E_Q^T / sqrt(e)) E_V.

    With words as rows the order as written is E_V E_Q^T E_K / M: `word` with the maps of keys and values exchanged.
    Without a softmax the two readings are therefore the same family of functions, and differ by their start only.

    Args:
        residual: adds E; Eq. 6 does not.
    """

    def __init__(self, width: int, *, form: str = "word", residual: bool = False):
        super().__init__()
        if form not in ("word", "channel", "softmax"):
            raise ValueError(f"self_attention is {form!r}; use 'word', 'channel' or 'softmax'")
        self.form, self.residual = form, residual
        self.key, self.query, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, words: Float[Tensor, "c l e"], mask: Bool[Tensor, "c l"]) -> Float[Tensor, "c l e"]:
        real = mask.unsqueeze(-1)
        k, q, v = (layer(words) * real for layer in (self.key, self.query, self.value))
        count = mask.sum(1).clamp(min=1)[:, None, None]
        if self.form == "channel":
            out = v @ (torch.einsum("cle,clf->cef", k, q) / count).mT
        elif self.form == "word":
            out = (torch.einsum("cle,cme->clm", k, q) / count) @ v
        else:
            logits = torch.einsum("cle,cme->clm", k, q) / math.sqrt(k.shape[-1])
            out = logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1) @ v
        return (out + words if self.residual else out) * real


def word_correlation(
    words: Float[Tensor, "c l e"], mask: Bool[Tensor, "c l"], *, similarity: str = "cosine"
) -> Float[Tensor, "c l"]:
    """Figure 3: how much each word relates to the words of its caption, summing to one over them.

    "The similarity matrix between textual words is firstly computed on the word embedding vector of the text, then
    the sum along each column is taken [...]. All values in a sentence are normalized." The paper does not say which
    similarity; we take the cosine (`product`: plain products, which long vectors dominate), cut it at zero, because a
    negative similarity would be a negative share, and divide by the sum.

    Raises:
        ValueError: For another similarity.
    """
    if similarity not in ("cosine", "product"):
        raise ValueError(f"similarity is {similarity!r}; use 'cosine' or 'product'")
    words = (F.normalize(words, dim=-1) if similarity == "cosine" else words) * mask.unsqueeze(-1)
    column = torch.einsum("cle,cme->clm", words, words).clamp(min=0).sum(1)
    return column / column.sum(1, keepdim=True).clamp(min=1e-12)


# ------------------------------------------------------------------------------ 3.3 multi-layer graph convolution
class GraphLayer(nn.Module):
    """Eq. 7-9, one layer: every node takes up its relations to all others.

        A_ij = mu(r_i) . nu(r_j) / N        Eq. 7
        R'   = (A R W_g) W_r + R            Eq. 8 and 9; rows are nodes

    The paper does not normalise A; we divide by the number of nodes, as the cited VSRN does, because raw sums over
    36 nodes explode in four layers (`relation="raw"` keeps them). W_r starts at zero: a new layer is the identity.

    Args:
        relation: `nodes`, `raw` or `softmax` (over j).
        norm: after W_r: `none`, `layer`, or `batch` (over all real nodes). With a norm it is the norm that starts
            at zero, for a norm of zeros has no useful gradient.
    """

    def __init__(self, width: int, *, relation: str = "nodes", norm: str = "none"):
        super().__init__()
        if relation not in ("nodes", "raw", "softmax"):
            raise ValueError(f"relation is {relation!r}; use 'nodes', 'raw' or 'softmax'")
        if norm not in ("none", "layer", "batch"):
            raise ValueError(f"graph_norm is {norm!r}; use 'none', 'layer' or 'batch'")
        self.relation = relation
        self.mu, self.nu = nn.Linear(width, width), nn.Linear(width, width)
        self.gather, self.update = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.norm = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}[norm](width)
        for parameter in (self.update if norm == "none" else self.norm).parameters():
            nn.init.zeros_(parameter)

    def forward(self, nodes: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        relations = torch.einsum("bnd,bmd->bnm", self.mu(nodes), self.nu(nodes))
        if self.relation == "softmax":
            relations = relations.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
        else:
            relations = relations * mask[:, None]
            if self.relation == "nodes":
                relations = relations / mask.sum(1).clamp(min=1)[:, None, None]
        change = self.update(relations @ self.gather(nodes))
        if isinstance(self.norm, nn.BatchNorm1d):  # padding is no node: it must not enter the statistics
            real = self.norm(change[mask])
            change = torch.zeros_like(change, dtype=real.dtype).masked_scatter(mask.unsqueeze(-1), real)
        else:
            change = self.norm(change)
        return nodes + change * mask.unsqueeze(-1)


class MGCN(nn.ModuleList):
    """Eq. 9: `depth` graph layers; depth 0 is the identity. The paper's l = 4 counts Eq. 8 as the first (H6)."""

    def __init__(self, width: int, depth: int = 4, *, relation: str = "nodes", norm: str = "none"):
        super().__init__(GraphLayer(width, relation=relation, norm=norm) for _ in range(depth))

    def forward(self, nodes: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        for layer in self:
            nodes = layer(nodes, mask)
        return nodes


class RegionEncoder(nn.Module):
    """Eq. 1 and 7-10: detector features to R*. A linear layer, unit length, then the graph.

    With `input_dropout` (H27, ours) an image loses a share of the channels in training, the same for all its regions:
    otherwise a small set of frozen features is learned by heart.
    """

    def __init__(self, features: int, config: HSLMConfig):
        super().__init__()
        self.embed, self.input_dropout = nn.Linear(features, config.width), config.input_dropout
        self.graph = MGCN(config.width, config.layers, relation=config.relation, norm=config.graph_norm)
        self.normalise_graph = config.normalise_graph

    def forward(self, features: Float[Tensor, "b n f"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        if self.training and self.input_dropout > 0:  # a mask "b 1 f": one of "b n f" costs n times more
            features = features * F.dropout(torch.ones_like(features[:, :1]), self.input_dropout)
        regions = F.normalize(self.embed(features), dim=-1) * mask.unsqueeze(-1)
        regions = self.graph(regions, mask)
        return F.normalize(regions, dim=-1) if self.normalise_graph else regions


class WordEncoder(nn.Module):
    """Eq. 2-6 and 11-14: word ids to E*. Embedding, self-attention, graph, GRU, unit length.

    With `include_special` [CLS] and [SEP] (the <start> and <end> of the public loaders) are words. A `graph_norm` of
    the batch is of regions alone.
    """

    def __init__(self, vocabulary: int, config: HSLMConfig):
        super().__init__()
        c, norm = config, "none" if config.graph_norm == "batch" else config.graph_norm
        self.embed, self.dropout = nn.Embedding(vocabulary, c.embed), nn.Dropout(c.dropout)
        self.attention = (
            WordSelfAttention(c.embed, form=c.self_attention, residual=c.self_residual)
            if c.self_attn
            else None
        )
        self.graph = MGCN(c.embed, c.layers, relation=c.relation, norm=norm)
        self.gru = nn.GRU(c.embed, c.width, batch_first=True, bidirectional=True)
        self.include_special = c.include_special

    def words(self, input_ids: Int[Tensor, "c l"], mask: Bool[Tensor, "c l"], special: Bool[Tensor, "c l"]):
        """The ids that count as words, moved to the front, and their mask."""
        if self.include_special:
            return input_ids, mask
        keep = mask & ~special
        order = (~keep).int().argsort(dim=1, stable=True)[:, : int(keep.sum(1).max())]
        return input_ids.gather(1, order), keep.gather(1, order)

    def stages(self, input_ids, mask, special) -> tuple[Tensor, Tensor, Bool[Tensor, "c m"]]:
        """E (Eq. 2), E_f (Eq. 6; E itself without self-attention), and the mask: what Figure 3 compares."""
        ids, mask = self.words(input_ids, mask, special)
        words = self.dropout(self.embed(ids)) * mask.unsqueeze(-1)
        return words, words if self.attention is None else self.attention(words, mask), mask

    def forward(
        self, input_ids: Int[Tensor, "c l"], mask: Bool[Tensor, "c l"], special: Bool[Tensor, "c l"]
    ) -> tuple[Float[Tensor, "c m d"], Bool[Tensor, "c m"]]:
        _, words, mask = self.stages(input_ids, mask, special)
        words = self.graph(words, mask)
        packed = pack_padded_sequence(words, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=mask.shape[1])
        states = states.unflatten(-1, (2, -1)).mean(2)  # Eq. 13
        return F.normalize(states, dim=-1), mask


# ------------------------------------------------------------------------------ 3.5 global vectors
class SelfAttentionPooling(nn.Module):
    """The global vector of 3.5: the mean asks, the parts answer, and their weighted sum is made unit.

        w = softmax(v . (tanh(W_l x_i) * tanh(W_g mean x)))        x^ = sum_i w_i x_i / |.|

    "We apply a self-attention mechanism, using E^ as a query": the form is that of the text side of SGRAF, which
    3.5 follows, without its dropout.
    """

    def __init__(self, width: int):
        super().__init__()
        self.local, self.query = nn.Linear(width, width), nn.Linear(width, width)
        self.vote = nn.Linear(width, 1, bias=False)  # a softmax takes no notice of a bias

    def forward(self, parts: Float[Tensor, "c l d"], mask: Bool[Tensor, "c l"]) -> Float[Tensor, "c d"]:
        real = mask.unsqueeze(-1)
        mean = (parts * real).sum(1) / real.sum(1).clamp(min=1)
        answer = self.vote(torch.tanh(self.local(parts)) * torch.tanh(self.query(mean))[:, None]).squeeze(-1)
        weights = answer.masked_fill(~mask, float("-inf")).softmax(-1)
        return F.normalize(torch.einsum("cl,cld->cd", weights, parts), dim=-1)


# ------------------------------------------------------------------------------ 3.4 and 3.5, for pairs
class Views(NamedTuple):
    """What the scorer needs of pictures beside R*: Gram matrices and projected regions, each made once."""

    regions: Float[Tensor, "g n d"]
    mask: Bool[Tensor, "g n"]
    gram: Float[Tensor, "g n n"] | None
    local: Float[Tensor, "g n d"] | None
    query: Float[Tensor, "g n d"] | None
    vector: Float[Tensor, "g d"] | None

    def __getitem__(self, index) -> Views:
        return Views(*(None if part is None else part[index] for part in self))

    def to(self, dtype: torch.dtype) -> Views:
        """The operands of the heavy products in another precision; norms and sums stay as they are."""
        return self._replace(**{name: part.to(dtype) for name, part in self._asdict().items()
                                if name in ("regions", "local") and part is not None})  # fmt: skip


def into(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    """`function(x)`, written over `x` where no gradient needs it: fresh memory costs more than the arithmetic."""
    return function(x, out=x) if not torch.is_grad_enabled() else function(x)


class PairScorer(nn.Module):
    """3.4 and 3.5: the matching score of every picture with every caption.

        f       = sigmoid(E* R*^T)                          Eq. 16, "m n": every word with every region
        R_a     = f R*, each row made unit                  Eq. 15 (`attend`), "m d": one context per word
        S_L     = W_l |E* - R_a|^2 / |.|                    Eq. 17-18, one similarity vector per word
        S_G     = W_g |E^ - R_a^|^2 / |.|                   Eq. 19, of the global vectors
        S*      = [S_L; S_G]                                Eq. 20, M + 1 nodes
        S_A     = sum_k sigmoid(w . s_k) s_k                Eq. 21
        S_F     = FC(S_A)                                   Eq. 22

    The paper's weights f do not sum to one; we make the context unit (`context_norm`), because |E* - R_a|^2 would
    otherwise measure how many regions there are. `gate` is the other reading of Eq. 15: a region is weighted by the
    mean or maximum of its scores over the words, R_a = g * R*, N x d; Eq. 18 then needs one vector per word, which
    is the same f applied to the gated regions, and the global vector attends over them.

    Without cross attention the global image vector is that of R* itself, and there is no local alignment: Eq. 18
    compares M vectors with M.

    `cross_scale` is a factor on the scores inside the sigmoid of Eq. 16; 1 in the paper. `node_gate` is `scalar` (one
    gate a node, then the sum) or `element` (one gate a component, then the mean); with the `node_weights` `l1` the
    scalar gates are divided by their sum.

    Raises:
        ValueError: For local alignment without cross attention, or neither alignment.
    """

    def __init__(self, config: HSLMConfig):
        super().__init__()
        c = config
        if not (c.glob or c.loc):
            raise ValueError("glob=False with loc=False: nothing is compared; switch one on")
        if c.loc and not c.cross_attn:
            raise ValueError("loc=True needs cross_attn=True: Eq. 18 compares a context for each word")
        self.cross_attn, self.glob, self.loc = c.cross_attn, c.glob, c.loc
        self.cross, self.gate_pool, self.node_weights = c.cross, c.gate_pool, c.node_weights
        self.cross_scale, self.context_norm = c.cross_scale, c.context_norm
        self.pool_image = SelfAttentionPooling(c.width) if c.glob else None
        self.compare_local = nn.Linear(c.width, c.sim, bias=False) if c.loc else None
        self.compare_global = nn.Linear(c.width, c.sim, bias=False) if c.glob else None
        self.gate = nn.Linear(c.sim, 1 if c.node_gate == "scalar" else c.sim)
        self.score = nn.Linear(c.sim, 1)

    # ---- once per picture
    def prepare(self, picture: Picture) -> Views:
        """Everything about pictures that no caption changes."""
        r, mask = picture
        if not self.cross_attn:
            return Views(r, mask, None, None, None, self.pool_image(r, mask))
        gram = torch.einsum("gnd,gmd->gnm", r, r)
        if not self.glob:
            return Views(r, mask, gram, None, None, None)
        pool = self.pool_image
        return Views(r, mask, gram, F.linear(r, pool.local.weight), F.linear(r, pool.query.weight), None)

    # ---- for every pair
    def tile(
        self,
        view: Views,
        words: Float[Tensor, "#g c l d"],
        real: Bool[Tensor, "#g c l"] | None,
        vector: Float[Tensor, "#g c d"] | None,
    ) -> Float[Tensor, "g c"]:
        """Logits of `g` pictures with `c` captions of `l` words each. `real` marks padding; None: there is none.

        Captions are shared by all pictures (a leading axis of 1), or each picture has its own (g).
        """
        local, globe = self.nodes(view, words, real, vector)
        return self.fuse(local, real, globe)

    def nodes(
        self,
        view: Views,
        words: Float[Tensor, "#g c l d"],
        real: Bool[Tensor, "#g c l"] | None,
        vector: Float[Tensor, "#g c d"] | None,
    ) -> tuple[Float[Tensor, "g c l s"] | None, Float[Tensor, "g c s"] | None]:
        """S_L of every word and S_G (Eq. 18 and 19); None for an alignment that is switched off."""
        g, (c, length) = len(view.regions), words.shape[1:3]
        if not self.cross_attn:
            return None, self.similarity(self.compare_global, vector - view.vector[:, None])
        f = self.relate(view, words.flatten(1, 2))  # g (c l) n
        gated = None
        if self.cross == "gate":
            gated = self.region_gate(f.unflatten(1, (c, length)), real)  # g c n
            f = (f.unflatten(1, (c, length)) * gated[:, :, None]).flatten(1, 2)
        if self.context_norm:
            square = ((f @ view.gram) * f).sum(-1, keepdim=True)
            f = f * square.clamp(min=1e-12).rsqrt()
        low = view.regions.dtype  # bf16 where the caller asked for it
        local = globe = None
        if self.loc:
            # words - context, the subtraction within the product
            flat = words.flatten(1, 2).to(low).expand(g, -1, -1)
            difference = torch.baddbmm(flat, f.to(low), view.regions, alpha=-1)
            local = self.similarity(self.compare_local, difference).unflatten(1, (c, length))
        if self.glob:
            weights = self.region_weights(view, f.unflatten(1, (c, length)), real, gated)
            mine = F.normalize(wide(weights.to(low) @ view.regions), dim=-1)  # g c d
            globe = self.similarity(self.compare_global, (vector - mine).to(low))
        return local, globe

    def parts(
        self, view: Views, words: Float[Tensor, "#g c l d"], vector: Float[Tensor, "#g c d"] | None
    ) -> tuple[Float[Tensor, "g c k"], Float[Tensor, "g c k"]]:
        """The logit of captions without padding taken apart: what each node adds to it, and the node's gate (the mean
        of its components where `node_gate` is `element`). Nodes are the words, then the whole, of those alignments that
        are switched on; their sum and the bias of FC (Eq. 22) are the logit.
        """
        local, globe = self.nodes(view, words, None, vector)
        both = (local, None if globe is None else globe.unsqueeze(2))
        nodes = torch.cat([part for part in both if part is not None], 2)
        gate = torch.sigmoid(self.gate(nodes))
        added = F.linear(gate * nodes, self.score.weight).squeeze(-1)
        if gate.shape[-1] > 1:
            added = added / nodes.shape[2]
        elif self.node_weights == "l1":
            added = added / gate.sum(2)
        return added, gate.mean(-1)

    @property
    def can_rank(self) -> bool:
        """Whether `rank` knows this form of the score: contexts of words, scalar gates, their plain sum."""
        return (
            self.cross_attn
            and self.cross == "attend"
            and self.gate.out_features == 1
            and self.node_weights != "l1"
        )

    def rank(
        self, view: Views, words: Float[Tensor, "1 c l d"], vector: Float[Tensor, "1 c d"] | None
    ) -> Float[Tensor, "g c"]:
        """`tile` of captions without padding, where no gradient is needed: fewer and cheaper passes over memory.

        tanh(x) = 2 sigmoid(2 x) - 1, five times as fast, and what is the same for all words falls out of the softmax
        over them; the bias of the pooled contexts is one more region of weight 1; similarity vectors are made unit
        after their two products, of which they leave two numbers. The last bits differ, so that training, whose
        hardest negatives they would change, stays with `tile`.
        """
        g, (c, length) = len(view.regions), words.shape[1:3]
        f, flat = self.relate(view, words.flatten(1, 2)), words.flatten(1, 2).expand(g, -1, -1)
        if self.context_norm:
            f *= ((f @ view.gram) * f).sum(-1, keepdim=True).clamp(min=1e-12).rsqrt()
        total = self.score.bias
        if self.loc:
            total = total + self.node(self.compare_local, flat, f @ view.regions).view(g, c, length).sum(2)
        if self.glob:
            pool, contexts = self.pool_image, f.view(g, c, length, -1)
            query = (2 * (contexts.mean(2) @ view.query + pool.query.bias)).sigmoid_()
            query = (2 * query - 1) * pool.vote.weight
            local = torch.cat([view.local, pool.local.bias.expand(g, 1, -1)], 1).mul_(2)
            answer = (F.pad(f, (0, 1), value=1.0) @ local).sigmoid_().view(g, c, length, -1)
            weights = answer.mul_(query[:, :, None]).sum(-1).mul_(2).softmax(-1)
            mine = F.normalize((weights[:, :, None] @ contexts).squeeze(2) @ view.regions, dim=-1)
            total = total + self.node(self.compare_global, vector.expand(g, -1, -1), mine)
        return total

    def node(
        self, layer: nn.Linear, one: Float[Tensor, "*x d"], other: Float[Tensor, "*x d"]
    ) -> Float[Tensor, "*x"]:
        """g_k FC(s_k) of Eq. 17, 21 and 22 for a scalar gate, without the bias of FC; `other` is overwritten."""
        square = torch.ops.aten.mse_loss.out(one, other, 0, out=other)  # the squared difference in one pass
        vector = F.linear(square, layer.weight)
        both = F.linear(vector, torch.cat([self.gate.weight, self.score.weight]))
        both /= torch.linalg.vector_norm(vector, dim=-1, keepdim=True).clamp_(min=1e-12)
        return torch.sigmoid(both[..., 0] + self.gate.bias) * both[..., 1]

    def relate(self, view: Views, words: Float[Tensor, "#g w d"]) -> Float[Tensor, "g w n"]:
        """Eq. 16: sigmoid of every word with every region; nothing where there is no region."""
        g, n = view.mask.shape
        words = words.to(view.regions.dtype)
        if len(words) == 1:  # one product for all pictures
            logits = (words[0] @ view.regions.flatten(0, 1).T).unflatten(1, (g, n)).transpose(0, 1)
        else:
            logits = torch.einsum("gwd,gnd->gwn", words, view.regions)
        return torch.sigmoid(self.cross_scale * wide(logits)) * view.mask[:, None]

    def region_gate(self, f: Float[Tensor, "g c l n"], real: Bool[Tensor, "#g c l"] | None):
        """Reading `gate` of Eq. 15: "g c n", a region's scores over the real words."""
        if self.gate_pool == "max":
            return (f if real is None else f * real.unsqueeze(-1)).amax(2)
        if real is None:
            return f.mean(2)
        return (f * real.unsqueeze(-1)).sum(2) / real.sum(2).clamp(min=1).unsqueeze(-1)

    def region_weights(
        self,
        view: Views,
        f: Float[Tensor, "g c l n"],
        real: Bool[Tensor, "#g c l"] | None,
        gated: Float[Tensor, "g c n"] | None,
    ) -> Float[Tensor, "g c n"]:
        """R_a^ of 3.5 as weights over regions: the mean context asks, the contexts answer.

        The same numbers as `SelfAttentionPooling` of the contexts (`attend`) or of the gated regions (`gate`).
        """
        pool, low = self.pool_image, view.local.dtype
        if gated is None:
            count = f.shape[2] if real is None else real.sum(2).clamp(min=1).unsqueeze(-1)
            shown = f if real is None else f * real.unsqueeze(-1)
            query = (
                torch.tanh((shown.sum(2) / count) @ view.query + pool.query.bias) * pool.vote.weight
            )  # g c d
            flat = pool.local.bias.to(low).expand(len(f), f.shape[1] * f.shape[2], -1)
            answer = into(torch.tanh, wide(torch.baddbmm(flat, f.flatten(1, 2).to(low), view.local)))
            logits = (answer.unflatten(1, f.shape[1:3]) @ query.unsqueeze(-1)).squeeze(-1)  # g c l
            if real is not None:
                logits = logits.masked_fill(~real, float("-inf"))
            return torch.einsum("gcl,gcln->gcn", logits.softmax(-1), f)
        count = view.mask.sum(1)[:, None, None]
        query = torch.tanh((gated / count) @ view.query + pool.query.bias) * pool.vote.weight
        answer = into(
            torch.tanh, wide(gated.unsqueeze(-1).to(low) * view.local[:, None]) + pool.local.bias
        )  # g c n d
        logits = (answer @ query.unsqueeze(-1)).squeeze(-1).masked_fill(~view.mask[:, None], float("-inf"))
        return logits.softmax(-1) * gated

    def similarity(self, layer: nn.Linear, difference: Float[Tensor, "*x d"]) -> Float[Tensor, "*x s"]:
        """Eq. 17, of the difference of two vectors."""
        vector = F.linear(into(torch.square, difference), layer.weight.to(difference.dtype))
        return F.normalize(wide(vector), dim=-1)

    def fuse(
        self,
        local: Float[Tensor, "g c l s"] | None,
        real: Bool[Tensor, "#g c l"] | None,
        globe: Float[Tensor, "g c s"] | None,
    ) -> Float[Tensor, "g c"]:
        """Eq. 20-22: nodes weighted and gathered, then one number; the logit.

        With scalar gates FC(sum_k g_k s_k) = sum_k g_k FC(s_k) + bias: the nodes are never stacked.
        """
        total = weight = 0.0
        for node, mask in ((local, real), (None if globe is None else globe.unsqueeze(2), None)):
            if node is None:
                continue
            gate = torch.sigmoid(self.gate(node))
            if mask is not None:
                gate = gate * mask.unsqueeze(-1)
            if gate.shape[-1] == 1:
                total = total + (gate * F.linear(node, self.score.weight)).sum((2, 3))
                weight = weight + gate.sum((2, 3))
            else:
                total = total + F.linear((gate * node).sum(2), self.score.weight).squeeze(-1)
                weight = weight + (node.shape[2] if mask is None else mask.sum(2))
        if self.gate.out_features > 1 or self.node_weights == "l1":
            total = total / weight
        return total + self.score.bias


# ------------------------------------------------------------------------------ the whole model
class HSLM(Pretrained, nn.Module):
    """Hierarchical semantic matching of regions and words; five switches give Table 4's twelve rows.

    The negatives of Eq. 23 are the `hardest`, the `mean` over all of the batch, or `random`: one of them for each image
    and caption, whose expectation is `mean` and which costs no search. With `rivals` the `hardest` is looked for
    among so many random negatives of each image and caption, anew in every step; 0 is the whole batch (the paper),
    1 is `random`. Between the two the loss is hard enough to teach and does not throw a weak model back onto the
    plateau. `contrastive` is no hinge: every negative of the batch counts, by a softmax (see `softmax_loss`).

    Args:
        features: width of the region features.
        vocabulary: number of word ids.
        warmup_steps: so many steps of `config.start` first (H26): the ways out of the plateau (see `hinge`).
    """

    def __init__(self, features: int, vocabulary: int, config: HSLMConfig, *, warmup_steps: int = 0):
        super().__init__()
        self.config, self.warmup_steps = config, warmup_steps
        self.image, self.text = RegionEncoder(features, config), WordEncoder(vocabulary, config)
        self.pool_text = SelfAttentionPooling(config.width) if config.glob else None
        self.pairs = PairScorer(config)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def encode_image(
        self,
        features: Float[Tensor, "b n f"],
        mask: Bool[Tensor, "b n"],
        places: Float[Tensor, "b n 5"] | None = None,
    ) -> Picture:
        """R* of pictures. Where the regions lie is not used: the paper's features carry no boxes."""
        return Picture(self.image(features, mask), mask)

    def encode_text(
        self, input_ids: Int[Tensor, "c l"], mask: Bool[Tensor, "c l"], special: Bool[Tensor, "c l"]
    ) -> Caption:
        """E* and the global vector of captions."""
        words, mask = self.text(input_ids, mask, special)
        return Caption(words, mask, self.pool_text(words, mask) if self.pool_text else None)

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """Eq. 23 of a batch of pairs: `image` and `text` (keywords of the encoders), `image_id`.

        Of the B x B scores only the hardest negatives carry a gradient in the hinge, so all are computed without
        one, and the 2 B hardest and the B true pairs once more with it: the same gradient for a third of the work,
        and memory for 3 B pairs. Several processes share their pairs: the loss is that of the whole batch.

        Returns:
            `loss`; `plateau`: 1 where the loss lies within 1 % of what it is when every score is the same: 2 B margin,
            or ln B of the contrastive loss.
        """
        picture, caption = self.encode_image(**batch["image"]), self.encode_text(**batch["text"])
        if (short := longest(caption.words.shape[1]) - caption.words.shape[1]) > 0:
            caption = caption._replace(
                words=F.pad(caption.words, (0, 0, 0, short)), mask=F.pad(caption.mask, (0, short))
            )
        picture = Picture(*(gather(part) for part in picture))
        caption = Caption(*(None if part is None else gather(part) for part in caption))
        ids = gather(batch["image_id"])
        same = ids[:, None] == ids[None, :]
        begins = self.training and self.steps < self.warmup_steps
        kind = self.config.start if begins else self.config.negatives
        view, flat = self.pairs.prepare(picture), 2 * len(same) * self.config.margin
        if kind == "contrastive":
            scores = self.config.start_scale * wide(score(self.pairs, view, caption))
            loss = softmax_loss(scores, same)
            flat = float(softmax_loss(torch.zeros_like(scores), same))
        elif kind == "mean":
            scores = self.squash(score(self.pairs, view, caption))
            loss = hinge(scores, same, self.config.margin, negatives="mean")
        else:
            pairs = lambda i, j: self.score_pairs(view, caption, i, j)  # noqa: E731
            with torch.no_grad():
                hard = hardest(same, 1 if kind == "random" else self.config.rivals, int(self.steps), pairs=pairs,
                               table=lambda: score(self.pairs, view, caption))  # fmt: skip
            loss = hinge_of_hardest(lambda i, j: self.squash(pairs(i, j)), same, hard, self.config.margin)
        if self.training:
            self.steps += 1
        return {"loss": loss, "plateau": ((loss.detach() - flat).abs() < 0.01 * flat).to(loss.dtype)}

    def squash(self, logits: Tensor) -> Tensor:
        """The score that Eq. 23 compares (H17)."""
        logits = wide(logits)
        return torch.sigmoid(logits) if self.config.loss_score == "sigmoid" else logits

    def score_pairs(
        self, view: Views, caption: Caption, pictures: Int[Tensor, " p"], captions: Int[Tensor, " p"]
    ) -> Float[Tensor, " p"]:
        """Logits of given pairs, padding masked: what training differentiates."""
        chosen = caption[captions]
        vector = None if chosen.vector is None else chosen.vector[:, None]
        return self.pairs.tile(view[pictures], chosen.words[:, None], chosen.mask[:, None], vector)[:, 0]

    def attend(self, image: dict, text: dict) -> Float[Tensor, "p l n"]:
        """f of Eq. 16 for pairs of pictures and captions (keywords of the encoders): every token with every region.

        Zero for padding, and for special tokens where they are no words. In double precision, for a sigmoid near one
        would make ties of regions that its logit tells apart.

        Raises:
            ValueError: For a model without cross attention.
        """
        if not self.pairs.cross_attn:
            raise ValueError("this model has no cross attention (cross_attn=False)")
        device = self.steps.device
        image, text = to_device(image, device), to_device(text, device)
        caption = self.encode_text(**text)
        view = self.pairs.prepare(self.encode_image(**image))
        f = self.pairs.relate(view._replace(regions=view.regions.double()), caption.words)
        counted = text["mask"] if self.text.include_special else text["mask"] & ~text["special"]
        whole = f.new_zeros(*counted.shape, f.shape[-1])
        whole[counted] = f[caption.mask]
        return whole


def score(
    scorer: PairScorer,
    view: Views,
    caption: Caption,
    *,
    tile: int = 0,
    dtype: torch.dtype | None = None,
    ranking: bool = False,
) -> Float[Tensor, "b c"]:
    """Logits of every picture with every caption, in tiles of captions of one length: no padding is computed.

    Args:
        view: `PairScorer.prepare` of the pictures.
        tile: pairs of a word and a picture in a tile, the rows of its products; 0 is 2,048 on a CPU, whose caches
            hold such a tile, and 131,072 elsewhere. Memory depends on it, not on the number of captions.
        dtype: bfloat16 for the heavy products; sums, norms and the score itself stay in the words' precision.
        ranking: by `PairScorer.rank` where it can: no gradients, other last bits.
    """
    fast = ranking and dtype is None and scorer.can_rank and not torch.is_grad_enabled()
    tile = tile or (2048 if caption.words.device.type == "cpu" else 131_072)
    lengths, words = caption.mask.sum(1), caption.words
    if dtype is not None:
        view, words = view.to(dtype), words.to(dtype)
    rows, columns = [], []
    for length in lengths.unique().tolist():
        # as many captions as leave room for a few pictures, then as many pictures
        for chunk in (lengths == length).nonzero().squeeze(1).split(max(1, tile // (4 * length))):
            part = words[chunk, :length][None]
            vector = None if caption.vector is None else caption.vector[chunk][None]
            block = max(1, tile // (length * len(chunk)))
            views = (view[k : k + block] for k in range(0, len(view.regions), block))
            rows.append(torch.cat([scorer.rank(some, part, vector) if fast else scorer.tile(some, part, None, vector)
                                   for some in views]))  # fmt: skip
            columns.append(chunk)
    return torch.cat(rows, 1)[:, torch.cat(columns).argsort()]


# ------------------------------------------------------------------------------ 3.6 objective
def hinge(
    scores: Float[Tensor, "b b"],
    same: Bool[Tensor, "b b"],
    margin: float = 0.2,
    *,
    negatives: str = "hardest",
) -> Float[Tensor, ""]:
    """Eq. 23: bidirectional triplet ranking loss, summed over the batch; the diagonal holds the true pairs.

        [m - S(I, C) + S(I, C^)]_+ + [m - S(I, C) + S(I^, C)]_+

    A caption of the *same picture* is not a negative (`same`). With every score equal the loss is 2 B m, and its
    gradient pushes the true pair up and its rivals down: a known plateau, in which training from scratch can stay
    for epochs. `negatives="mean"` averages over all negatives; begun with, it leads out of it. Rivals that tie for the
    hardest share its gradient here; `HSLM.forward`, which looks for the hardest first, gives it to the first of them.
    """
    true = scores.diagonal()
    total = scores.new_zeros(())
    for table in (scores, scores.T):
        excess = F.relu(margin - true[:, None] + table)
        if negatives == "hardest":
            total = total + excess.masked_fill(same, 0.0).amax(1).sum()
        else:
            others = ~same
            total = total + ((excess * others).sum(1) / others.sum(1).clamp(min=1)).sum()
    return total


def hardest(
    same: Bool[Tensor, "b b"], rivals: int, step: int, *, table: Callable[[], Tensor], pairs: Callable
) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
    """The hardest caption of each picture and picture of each caption, of all or of so many random ones.

    What is drawn comes from the step's number: alike in every process, and in a run that was resumed.

    Args:
        rivals: how many are drawn for each picture and each caption; 0 is all.
        table: gives the scores of all, "b b". pairs: those of given pictures with given captions.
    """
    b = len(same)
    if rivals == 0 or rivals >= b:
        scores = table().masked_fill(same, float("-inf"))
        return scores.argmax(1), scores.argmax(0)
    drawn = torch.rand((b, b), generator=torch.Generator().manual_seed(step)).to(same.device)
    captions = drawn.masked_fill(same, -1.0).topk(rivals, dim=1).indices  # b k, of each picture
    pictures = drawn.T.masked_fill(same, -1.0).topk(rivals, dim=1).indices  # of each caption
    if rivals == 1:
        return captions[:, 0], pictures[:, 0]
    own = torch.arange(b, device=same.device).repeat_interleave(rivals)
    flat = torch.cat([own, pictures.flatten()]), torch.cat([captions.flatten(), own])
    scores = pairs(*flat).masked_fill(same[flat], float("-inf"))
    first, second = scores.view(2, b, rivals).argmax(-1, keepdim=True)
    return captions.gather(1, first)[:, 0], pictures.gather(1, second)[:, 0]


def hinge_of_hardest(
    scores: Callable, same: Bool[Tensor, "b b"], hard: tuple[Tensor, Tensor], margin: float
) -> Float[Tensor, ""]:
    """`hinge` of rivals that were found before (`hardest`): 3 B scores, not B x B, carry a gradient.

    Args:
        scores: gives those of given pictures with given captions, as the hinge compares them.
    """
    rows = torch.arange(len(same), device=same.device)
    hard_captions, hard_pictures = hard
    pictures, captions = torch.cat([rows, rows, hard_pictures]), torch.cat([rows, hard_captions, rows])
    true, hard_caption, hard_picture = scores(pictures, captions).chunk(3)
    some = ~same.all(1)  # a batch of one picture has no negatives
    return (some * (F.relu(margin - true + hard_caption) + F.relu(margin - true + hard_picture))).sum()


def softmax_loss(scores: Float[Tensor, "b b"], same: Bool[Tensor, "b b"]) -> Float[Tensor, ""]:
    """The mean of -log softmax of the true pair among the batch, over rows and over columns; the diagonal is true.

    HSLM's paper has no such loss. We start with it (H26), because the hinge on the hardest negatives of a model that
    knows nothing has no direction. A caption of the *same image* is not a negative (`same`), as in `hinge`.
    """
    others = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    table, target = scores.masked_fill(others, float("-inf")), torch.arange(len(same), device=same.device)
    return (F.cross_entropy(table, target) + F.cross_entropy(table.T, target)) / 2


# ------------------------------------------------------------------------------ ranking a split
def tile_scores(
    model: HSLM,
    pictures: Callable[[list[int]], dict],
    captions: Callable[[list[int]], dict],
    *,
    block: int = 128,
    tile: int = 0,
    dtype: torch.dtype | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The `score_block` of `evaluation.retrieval.retrieval_blocks`: indices of pictures and captions to logits.

    Args:
        pictures, captions: indices to keywords of the encoders (a source's `batch`).
        block: how many are encoded at a time.

    The last tile's pictures and captions are kept encoded, for the next tile shares one of them.
    """
    device = next(model.parameters()).device

    def encode_pictures(index: list[int]) -> Views:
        parts = [model.pairs.prepare(model.encode_image(**to_device(pictures(index[k : k + block]), device)))
                 for k in range(0, len(index), block)]  # fmt: skip
        return Views(
            *(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
        )

    def encode_captions(index: list[int]) -> Caption:
        parts = [
            model.encode_text(**to_device(captions(index[k : k + block]), device))
            for k in range(0, len(index), block)
        ]
        length = max(part.words.shape[1] for part in parts)
        parts = [part._replace(words=F.pad(part.words, (0, 0, 0, length - part.words.shape[1])),
                               mask=F.pad(part.mask, (0, length - part.mask.shape[1]))) for part in parts]  # fmt: skip
        return Caption(
            *(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
        )

    kept: dict[str, tuple] = {}

    def encoded(kind: str, index: Tensor, encode):
        listed = index.tolist()
        if kept.get(kind, (None,))[0] != listed:
            kept[kind] = (listed, encode(listed))
        return kept[kind][1]

    @torch.no_grad()
    def score_block(i: Tensor, j: Tensor) -> Tensor:
        view, caption = encoded("pictures", i, encode_pictures), encoded("captions", j, encode_captions)
        return score(model.pairs, view, caption, tile=tile, dtype=dtype, ranking=True).float()

    return score_block
