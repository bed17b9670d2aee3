"""HSLM's pair scores as the paper writes them: caption by caption, every context made, every layer applied to it.

Written once, as the reference that the fast scorer must equal and is timed against. The pictures of a block go
together, as in the public code of such models; nothing else is shared between pairs.
"""

import torch
import torch.nn.functional as F


def naive_scores(model, regions, words, vectors):
    """Logits "b c". `regions` "b n d"; `words` a list of "l d", one per caption; `vectors` "c d" or None."""
    pairs = model.pairs
    return torch.stack(
        [
            one_caption(pairs, regions, w, None if vectors is None else vectors[c])
            for c, w in enumerate(words)
        ],
        1,
    )


def one_caption(p, regions, words, vector):
    b, _, d = regions.shape
    words = words.expand(b, -1, -1)  # the caption, repeated for every picture
    if not p.cross_attn:
        return fuse(
            p, [similarity(p.compare_global, vector.expand(b, -1), pool(p.pool_image, regions))[:, None]]
        )
    f = torch.sigmoid(p.cross_scale * words @ regions.mT)  # Eq. 16: b l n
    shown = regions
    if p.cross == "gate":
        gate = f.mean(1) if p.gate_pool == "mean" else f.amax(1)  # b n
        shown = gate[..., None] * regions
    context = f @ shown  # Eq. 15: b l d
    if p.context_norm:
        context = F.normalize(context, dim=-1, eps=1e-6)
    nodes = []
    if p.loc:
        nodes.append(similarity(p.compare_local, words, context))  # Eq. 18
    if p.glob:
        image = pool(p.pool_image, context if p.cross == "attend" else shown)
        nodes.append(similarity(p.compare_global, vector.expand(b, d), image)[:, None])  # Eq. 19
    return fuse(p, nodes)


def pool(layer, parts):
    """Self-attention with the mean as query."""
    common = torch.tanh(layer.local(parts)) * torch.tanh(layer.query(parts.mean(1)))[:, None]
    weights = torch.softmax(layer.vote(common), 1)
    return F.normalize((weights * parts).sum(1), dim=-1)


def similarity(layer, one, other):
    """Eq. 17."""
    return F.normalize(layer((one - other).abs() ** 2), dim=-1)


def fuse(p, nodes):
    """Eq. 20-22."""
    nodes = torch.cat(nodes, 1)  # b k s
    gates = torch.sigmoid(p.gate(nodes))
    if gates.shape[-1] > 1:
        fused = (gates * nodes).mean(1)
    elif p.node_weights == "l1":
        fused = (gates / gates.sum(1, keepdim=True) * nodes).sum(1)
    else:
        fused = (gates * nodes).sum(1)
    return p.score(fused).squeeze(-1)
